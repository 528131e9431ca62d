"""The engine protocol, the precision wrapper, and the choice of an engine."""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn

from fastmim.contrast import Representations, Rest
from fastmim.ema import EmaPair

# Files of a checkpoint.
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"


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
    zero_offload: str = "none"
    has_graph: bool = False
    """Steps will be captured into a CUDA graph, see graph.py."""


class Engine(Protocol):
    """Forward, backward, step and state of a method over one or more processes."""

    rank: int
    world: int
    device: torch.device

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        """A StepOutput for one micro-batch."""
        ...

    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        """`Method.represent`, without gradient."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradient; owns the division by the number of accumulated micro-batches."""
        ...

    def step(self, pairs: Sequence[EmaPair] = (), momentum: float | Tensor = 1.0) -> StepInfo:
        """Clips, updates the parameters, moves each target towards its online tensor, clears the gradients.

        Unless the gradient is not finite: then nothing changes.

        Args:
            pairs: online and target tensors.
            momentum: of the targets; a number, or (single and ddp alone) a float64 scalar on the device.
        """
        ...

    def set_lr(self, lr: float | Tensor) -> None:
        """Sets the learning rate; a tensor (single and ddp alone) is read anew by each step, in a captured graph, too."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it, every rank sees all parameters unsharded (for evaluation); collective."""
        ...

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass, for evaluation."""
        ...

    def save(self, put: "Put") -> None:
        """Gives weights and optimizer state, whole and by parameter name; collective, rank 0 calls `put`."""
        ...

    def load(self, source: "Source") -> None:
        """Takes what `save` of any engine and world size gave; collective."""
        ...

    def close(self) -> None:
        """Ends the work with other processes; to be called before the process group is left, and nothing after it."""
        ...


# (file, name, tensor): the tensor is copied before the call returns, or before the device runs anything later.
Put = Callable[[str, str, Tensor], None]


class Source(Protocol):
    """A checkpoint to load from."""

    names: dict[str, list[str]]
    """Names of the tensors of each file."""

    def expect(self, file: str, names: Iterable[str]) -> None:
        """Raises if the file has other names."""
        ...

    def get(self, file: str, name: str, like: Tensor) -> Tensor:
        """A tensor of the shape and the type of `like`, on this rank's device; collective."""
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

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        with self.autocast():
            return self.method(batch, rng, *rest)

    @torch.no_grad()
    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        with self.autocast():
            return self.method.represent(batch, rng)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are warmed up and captured, see graph.py."""
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Within it, a GPU's work is put on that stream, behind what was asked for before and before what is asked for later.

    DDP's nodes of the backward pass stay where they were made.
    """
    if device.type != "cuda":
        yield
        return
    stream, outer = capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


# Share of a device's memory that weights, gradients and AdamW may take; activations get the rest. Source: own choice.
STATE_SHARE = 0.5


class Choice(NamedTuple):
    engine: str
    stage: int
    offload: str
    reason: str


def state_bytes(engine: str, stage: int, offload: str, world: int, parameters: int, frozen: int) -> float:
    """Bytes of one device for fp32 weights, gradients and AdamW's two moments; followers (EMA) have weights only.

    Source: ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5) for fp32; stages 1 and 2 of DeepSpeed keep a copy of
    the weights that they step on.
    """
    if engine != "zero" or stage == 0:
        return 16 * parameters + 4 * frozen
    optimizer = 0 if offload != "none" else 8 / world
    master = 0 if offload != "none" or stage == 3 else 4 / world
    weights = 4 if stage < 3 else 0 if offload == "all" else 4 / world
    gradients = 4 if stage < 2 else 4 / world
    return (weights + gradients + optimizer + master) * parameters + weights * frozen


def choose(
    wanted: str,
    zero: int | None,
    world: int,
    parameters: int,
    device_bytes: int | None,
    *,
    frozen: int = 0,
    offload: str = "none",
) -> Choice:
    """Picks an engine: the first that fits, in the order of measured speed.

    That order, two processes on a CPU, time per step over DDP's: DDP 1.00, ZeRO-1 and -2 1.06, ZeRO-3 1.65; on GPUs
    others report the same order (DDP 2.6 times as fast as ZeRO-2 for 3 B parameters that fit; OpenTau issue 177).

    Args:
        wanted: auto, single, ddp or zero.
        zero: ZeRO stage asked for, or None.
        world: number of processes.
        parameters: trainable ones.
        device_bytes: memory of one device, or None if not known.
        frozen: parameters that follow others.
        offload: none, optimizer or all, as asked for.
    """
    if zero and world == 1 and offload == "none":
        # The same arithmetic, with copies of all gradients and weights between shards and parameters.
        return Choice("zero", 0, "none", f"--zero {zero} was given, and one process has all shards: nothing to share")
    if zero is not None:
        return Choice("zero", zero, offload, f"--zero {zero} was given")
    if wanted == "zero":
        return Choice("zero", 0, "none", "--engine zero was given; without --zero, nothing is sharded")
    if wanted != "auto":
        return Choice(wanted, 0, "none", f"--engine {wanted} was given")
    plain = "single" if world == 1 else "ddp"
    if device_bytes is None:
        why = "one process: nothing to share" if world == 1 else f"{world} processes without GPUs: DDP is the fastest"
        return Choice(plain, 0, "none", why)

    def gib(choice: tuple[str, int, str]) -> float:
        return state_bytes(*choice, world, parameters, frozen) / 2**30

    most = STATE_SHARE * device_bytes / 2**30
    sharded = [("zero", stage, "none") for stage in (1, 2, 3)] if world > 1 else []
    order = [(plain, 0, "none"), *sharded, ("zero", 2, "optimizer"), ("zero", 3, "all")]
    chosen = next((choice for choice in order if gib(choice) <= most), order[-1])
    need = f"weights, gradients and AdamW take {gib(chosen):.1f} GiB of a device's {device_bytes / 2**30:.0f}"
    if chosen == order[0]:
        return Choice(*chosen, f"{need}: {'nothing to share' if world == 1 else 'DDP is the fastest that fits'}")
    before = order[order.index(chosen) - 1]
    name = f"ZeRO-{before[1]}{'' if before[2] == 'none' else ' with offload'}" if before[0] == "zero" else before[0]
    return Choice(*chosen, f"{need}; {name} would take {gib(before):.1f}, and more than {most:.0f} leaves too little")


def build(name: str, method: nn.Module, spec: EngineSpec) -> Engine:
    """The engine of that name; only `zero` imports deepspeed."""
    module = importlib.import_module(f"fastmim.engine.{name}")
    return module.ENGINE(method, spec)
