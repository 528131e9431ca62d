"""Batches from any step on, through the death of data workers."""

from collections.abc import Iterator

from fastmim_pipelines.spec import Batch, DataError, Loader

from fastmim.dist import rank

# How often in a row workers that died are started again at the same place. Source: own choice.
MOST_RESTARTS = 3


def batches_from(loader: Loader, step: int) -> Iterator[Batch]:
    """The loader's batches without end, epoch after epoch.

    Raises:
        DataError: its workers keep dying.
    """
    place, restarts = step, 0
    while True:
        try:
            for batch in loader.epoch(*divmod(place, loader.steps_per_epoch)):
                yield batch
                place, restarts = place + 1, 0
        except RuntimeError as e:
            # What is due is a function of the place: new workers go on with the same images and crops.
            if not getattr(loader, "workers", 0):
                raise
            restarts += 1
            reason = str(e).splitlines()[0]
            if restarts > MOST_RESTARTS:
                raise DataError(
                    f"rank {rank()}, step {place}: data workers died {restarts} times in a row: {reason}"
                ) from e
            print(f"warning   rank {rank()}, step {place}: data workers started again: {reason}", flush=True)
