"""The engine protocol, the precision wrapper, and the choice of an engine."""

import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn

from fastmim.ema import EmaPair


class StepInfo(NamedTuple):
    """What an optimizer step did; tensors stay on the device."""

    applied: Tensor
    """0-d bool: False if a non-finite gradient made the step be skipped."""
    grad_norm: Tensor
    """0-d float32: norm of the whole gradient before clipping."""


class EngineSpec(NamedTuple):
    """Everything an engine needs besides the method; written once, in the run's configuration."""

    device: torch.device
    precision: str
    accumulate: int
    micro_batch: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    clip: float | None
    zero_stage: int


class Engine(Protocol):
    """Forward, backward, step and state of a method over one or more processes."""

    rank: int
    world: int
    device: torch.device

    def forward(self, batch: Batch, rng: Tensor):
        """A StepOutput for one micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; owns the division by the number of accumulated micro-batches."""
        ...

    def step(self) -> StepInfo:
        """Clips, updates the parameters, clears the gradients."""
        ...

    def set_lr(self, lr: float) -> None: ...

    def ema(self, pairs: list[EmaPair], momentum: float) -> None:
        """Moves each target towards its online tensor, unless the last step was skipped."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it, every rank sees all parameters unsharded (for evaluation); collective."""
        ...

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass, for evaluation."""
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state by parameter name; collective, rank 0 writes."""
        ...

    def load(self, folder: Path) -> None:
        """Reads what `save` of any engine and world size wrote."""
        ...


class Precise(nn.Module):
    """Runs a method under autocast. DeepSpeed switches an outer autocast off on GPUs, so it must be inside."""

    def __init__(self, method: nn.Module, device_type: str, precision: str):
        super().__init__()
        self.method = method
        self.device_type, self.precision = device_type, precision

    def autocast(self) -> torch.autocast:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        enabled = dtype != torch.float32
        return torch.autocast(self.device_type, dtype if enabled else torch.bfloat16, enabled=enabled)

    def forward(self, batch: Batch, rng: Tensor):
        with self.autocast():
            return self.method(batch, rng)


# Bytes per trainable parameter: fp32 weight, gradient and two AdamW moments.
TRAINING_BYTES = 16


def choose(
    wanted: str, zero: int | None, world: int, parameters: int, device_bytes: int | None
) -> tuple[str, int, str]:
    """Picks an engine.

    Args:
        wanted: auto, single, ddp or zero.
        zero: ZeRO stage asked for, or None.
        world: number of processes.
        parameters: trainable ones.
        device_bytes: memory of one device, or None if not known.

    Returns:
        (engine, ZeRO stage, reason).
    """
    need = parameters * TRAINING_BYTES
    if zero is not None:
        return "zero", zero, f"--zero {zero} was given"
    if wanted == "zero":
        return "zero", 0, "--engine zero was given; without --zero, nothing is sharded"
    if wanted != "auto":
        return wanted, 0, f"--engine {wanted} was given"
    if world == 1:
        return "single", 0, "one process: nothing to share"
    if device_bytes is not None and need > 0.5 * device_bytes:
        return (
            "zero", 3, f"weights, gradients and AdamW take {need / 2**30:.0f} GiB of a device's {device_bytes / 2**30:.0f}"
        )  # fmt: skip
    return "ddp", 0, f"{world} processes, and the model fits on each: DDP is faster than sharding then"


def build(name: str, method: nn.Module, spec: EngineSpec) -> Engine:
    """The engine of that name; only `zero` imports deepspeed."""
    module = importlib.import_module(f"fastmim.engine.{name}")
    return module.ENGINE(method, spec)
