"""Random pictures made once: what a step costs when data cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .sampling import batch_positions, permute
from .spec import Batch, CropSpec, check_boxes, check_crops

_POOL = 64  # different pictures
IMAGENET_TRAIN = 1_281_167  # images; so that epochs have a familiar length


class SyntheticLoader:
    """Batches of noise with the ids and the order of a data set of `count` images; picture = f(seed, id).

    Args:
        crops, batch_size, rank, world, seed, in_chans: as for FolderLoader.
        count: images per epoch that are pretended.
        device: where the pool lives, and the batches with it.
    Raises:
        ValueError: arguments out of range, or fewer images than one batch.
    """

    def __init__(
        self,
        crops: Sequence[CropSpec],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        in_chans: int = 3,
        count: int = IMAGENET_TRAIN,
        device: torch.device | str = "cpu",
    ):
        batch_positions(0, batch_size, rank, world)  # checks the three
        self.steps_per_epoch = count // batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"batch_size: expected at most the {count} synthetic images, got {batch_size}.")
        self._place, self._count, self._seed = (batch_size, rank, world), count, seed
        generator = torch.Generator().manual_seed(seed)
        shapes = [(min(_POOL, count), in_chans, *crop.size) for crop in check_crops(crops, in_chans)]
        noises = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]
        self._pools = [noise.to(device) for noise in noises]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step in range(start_step, self.steps_per_epoch):
            positions = batch_positions(step, *self._place)
            ids, device = torch.from_numpy(permute(self._seed, epoch, self._count, positions)), self._pools[0].device
            if device.type == "cuda":
                ids = ids.pin_memory().to(
                    device, non_blocking=True
                )  # from other memory, the host would wait for the GPU
            yield Batch(tuple(pool[ids % len(pool)] for pool in self._pools), ids)

    def set_boxes(self, boxes: np.ndarray | None) -> None:
        """See Loader.set_boxes. Noise has no objects: checked, and nothing else."""
        if boxes is not None:
            check_boxes(boxes, self._count)

    def close(self) -> None:
        """Nothing runs in the background."""
