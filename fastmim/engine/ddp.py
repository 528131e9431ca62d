"""Several processes with a copy of the model each: torch's DistributedDataParallel."""

from contextlib import nullcontext

from fastmim_pipelines.spec import Batch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmim.dist import start
from fastmim.engine.base import EngineSpec, StepInfo
from fastmim.engine.single import SingleEngine


class DdpEngine(SingleEngine):
    """SingleEngine whose last micro-batch of a step averages the gradients over the ranks."""

    def __init__(self, method: nn.Module, spec: EngineSpec):
        start(spec.device)
        super().__init__(method, spec)
        ids = [spec.device.index] if spec.device.type == "cuda" else None
        self.parallel = DistributedDataParallel(
            self.precise, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        self.micro_steps = 0

    def _synchronized(self):
        is_last = self.micro_steps == self.spec.accumulate - 1
        return nullcontext() if is_last else self.parallel.no_sync()

    def forward(self, batch: Batch, rng: Tensor):
        with self._synchronized():
            return self.parallel(batch, rng)

    def backward(self, loss: Tensor) -> None:
        with self._synchronized():
            super().backward(loss)
        self.micro_steps += 1

    def step(self) -> StepInfo:
        self.micro_steps = 0
        return super().step()


ENGINE = DdpEngine
