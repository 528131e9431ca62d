"""Several processes with a copy of the model each: torch's DistributedDataParallel."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmim.contrast import Rest
from fastmim.dist import start
from fastmim.ema import EmaPair
from fastmim.engine.base import EngineSpec, StepInfo, on_capture_stream
from fastmim.engine.single import SingleEngine


def data_parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module in DDP. There are no buffers to synchronize: all of ours are constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.11 lacks the new name
        return DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def release_group(parallel: DistributedDataParallel) -> None:
    """Before the process group is left: ends the module's use of it, and any use of the module.

    Whoever is last to give a group up waits for its threads. Python does so without its lock, torch's reducer with it,
    for which these threads may wait, and nothing ever ends. Source: pytorch issue 56297.
    """
    del parallel.reducer, parallel.logger, parallel.process_group


class DdpEngine(SingleEngine):
    """SingleEngine whose last micro-batch of a step averages the gradients over the ranks."""

    def __init__(self, method: nn.Module, spec: EngineSpec):
        start(spec.device)
        super().__init__(method, spec)
        with on_capture_stream(spec.device) if spec.has_graph else nullcontext():
            self.parallel = data_parallel(self.precise, spec.device)
        self.micro_steps = 0

    def _synchronized(self):
        is_last = self.micro_steps == self.spec.accumulate - 1
        return nullcontext() if is_last else self.parallel.no_sync()

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        with self._synchronized(), self.rounded():
            return self.parallel(batch, rng, *rest)

    def backward(self, loss: Tensor) -> None:
        with self._synchronized():
            super().backward(loss)
        self.micro_steps += 1

    def step(self, pairs: Sequence[EmaPair] = (), momentum: float | Tensor = 1.0) -> StepInfo:
        self.micro_steps = 0
        return super().step(pairs, momentum)

    def discard(self) -> Tensor:
        self.micro_steps = 0
        return super().discard()

    def close(self) -> None:
        release_group(self.parallel)


ENGINE = DdpEngine
