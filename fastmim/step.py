"""One optimizer step as a program: from a batch, the rng and two numbers to new weights, with nothing read on the way."""

import functools
import time
from collections.abc import Callable, Iterator

import torch
from fastmim_pipelines.spec import Batch
from torch import Tensor

from fastmim import dist
from fastmim.contrast import Rest, join
from fastmim.engine.base import Engine, StepInfo
from fastmim.methods.base import Method, StepOutput


class StepProgram:
    """What a step does to a method on an engine, in two parts: the gradient, and the update.

    Args:
        method, engine: see their protocols.
        accumulate: micro-batches of a step.
        contrast_batch: "step" or "micro", see TrainConfig.
        at: told what begins.
        add_time: told how many seconds of a forward pass were this process's own.
    """

    def __init__(
        self,
        method: Method,
        engine: Engine,
        accumulate: int,
        contrast_batch: str,
        at: Callable[[str], None] = lambda phase: None,
        add_time: Callable[[float], None] = lambda seconds: None,
    ):
        self.method, self.engine, self.accumulate, self.at, self.add_time = method, engine, accumulate, at, add_time
        self.pairs = method.ema_pairs()
        has_parts = accumulate > 1 and contrast_batch == "step"
        self.joins_contrast = has_parts and method.mixes_images and method.can_represent()

    def gradient(self, batch: Batch, rng: Tensor) -> list[StepOutput]:
        """Adds up the gradient of a rank's share of a step, on the engine's device; what each micro-batch gave."""
        micros = list(split(batch, self.accumulate))
        rests: list[tuple[Rest, ...]] = [()] * len(micros)
        if self.joins_contrast:
            rests = [(rest,) for rest in join([self.engine.represent(micro, rng) for micro in micros])]
        outputs = []
        for micro, rest in zip(micros, rests):
            out = self.forward(micro, rng, rest)
            self.at("backward")
            self.engine.backward(out.loss)
            outputs.append(out._replace(loss=out.loss.detach()))
        return outputs

    def forward(self, micro: Batch, rng: Tensor, rest: tuple[Rest, ...]) -> StepOutput:
        self.at("forward")
        began, waited = time.perf_counter(), dist.waited_s
        out = self.engine.forward(micro, rng, *rest)
        self.add_time(time.perf_counter() - began - (dist.waited_s - waited))
        return out

    def update(self, rng: Tensor, momentum: float | Tensor) -> StepInfo:
        """Steps with the engine's learning rate, moves the targets, and sets the rng to the next step."""
        info = self.engine.step(self.pairs, momentum)
        rng[1].add_(1)
        return info


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches come to a GPU."""
    return torch.cuda.Stream(device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; shares what is there already.

    A GPU gets it beside the steps that it has still to do, and the host does not wait for them: from memory that is not
    page-locked it might, so what lies there is put into such memory first.
    """

    def moved(tensor: Tensor) -> Tensor:
        is_on_host = device.type == "cuda" and tensor.device.type == "cpu"
        return (tensor.pin_memory() if is_on_host else tensor).to(device, non_blocking=True)

    if device.type != "cuda":
        return Batch(tuple(map(moved, batch.crops)), moved(batch.ids))
    stream, current = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = Batch(tuple(map(moved, batch.crops)), moved(batch.ids))
    current.wait_stream(stream)
    for tensor in (*copied.crops, copied.ids):
        # It is of the copies' memory, where the next batch must not go before this one was read.
        tensor.record_stream(current)
    return copied


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Micro-batches of a rank's share."""
    crops, ids = [crop.chunk(parts) for crop in batch.crops], batch.ids.chunk(parts)
    for i in range(parts):
        yield Batch(tuple(c[i] for c in crops), ids[i])
