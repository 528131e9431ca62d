"""A whole step as one CUDA graph: captured once, then replayed with a single launch.

Forward, backward, clipping, AdamW, EMA and the step counter of the rng read and write tensors that stay where they are.
Between two steps the host only fills in images, learning rate and momentum. Rules of capture:
docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from typing import Literal, NamedTuple

import torch
from fastmim_pipelines.spec import Batch
from torch import Tensor

from fastmim.config import ConfigError
from fastmim.engine.base import StepInfo, on_capture_stream
from fastmim.engine.ddp import DdpEngine
from fastmim.methods.base import StepOutput
from fastmim.step import StepProgram, to_device

# Ordinary steps before the capture: kernels are compiled, libraries loaded, moments made. Source: torch's notes ask for 3,
# and for 11 with DDP, which times its first 10.
WARMUP_STEPS, WARMUP_STEPS_DDP = 3, 11
# How far the first replay's loss and gradient norm may be from those of the same step without a graph: the order of
# additions may differ, and bf16 has 8 bits. Source: own choice.
TOLERANCE = 1e-2


class CaptureError(Exception):
    """The step cannot be captured. Weights and rng are those of before."""

    exit_code = 2


class GraphError(Exception):
    """A graph is fed with something else, or gives something else, than the step it stands for."""

    exit_code = 2


class GraphChoice(NamedTuple):
    is_used: bool
    reason: str


def choose_graph(
    wanted: Literal["auto", "on", "off"], device: torch.device, engine: str, precision: str, *, reads_host: bool
) -> GraphChoice:
    """Whether steps are captured, and why.

    Args:
        wanted: as asked for.
        device, engine, precision: of the run.
        reads_host: whether the method looks something up on the host in each step.

    Raises:
        ConfigError: "on", where it is not possible.
    """
    if wanted == "off":
        return GraphChoice(False, "--graph off was given")
    obstacles = {
        f"a CUDA device, got {device.type}, where no launch costs more than its work": device.type != "cuda",
        f"--engine single or ddp, got {engine}, whose step reads the device": engine not in ("single", "ddp"),
        "bf16 or fp32, got fp16, whose loss scale changes on the host": precision == "fp16",
        "targets that are computed on the device, got recorded ones": reads_host,
    }
    obstacle = next((what for what, is_there in obstacles.items() if is_there), None)
    if wanted == "on":
        if obstacle is not None:
            raise ConfigError(f"--graph on: expected {obstacle}; use --graph auto or off")
        return GraphChoice(True, "--graph on was given")
    if obstacle is not None:
        return GraphChoice(False, f"it needs {obstacle}")
    if engine == "ddp":
        return GraphChoice(False, "captured collectives have not been measured yet; --graph on captures them, too")
    return GraphChoice(True, "one launch a step")


class StaticStep:
    """Runs a step program on tensors that stay in place; on a GPU, as a graph after the warm-up.

    Args:
        program: of the run. The steps of the warm-up count like all others.
    """

    def __init__(self, program: StepProgram):
        self.program, self.engine = program, program.engine
        self.warmup_steps = WARMUP_STEPS_DDP if isinstance(self.engine, DdpEngine) else WARMUP_STEPS
        device = self.engine.device
        # As exact as the numbers that they stand for.
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.momentum = torch.zeros((), dtype=torch.float64, device=device)
        self.batch: Batch | None = None
        self.rng: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[Tensor, list[StepOutput], StepInfo] | None = None
        self.steps = 0

    def __call__(self, batch: Batch, rng: Tensor, lr: float, momentum: float) -> tuple[list[StepOutput], StepInfo]:
        """One step.

        Args:
            batch: a rank's share; the same shapes in each call.
            rng: the same tensor in each call; moved on by one step.
            lr, momentum: of this step.

        Returns:
            What each micro-batch gave, and what the update did; the latter's tensors are those of the next step, too.

        Raises:
            CaptureError: the step was not taken.
            GraphError: batches differ in shape, or the first replay gave other numbers than the step without a graph.
        """
        self._fill(batch, rng, lr, momentum)
        device = self.engine.device
        with on_capture_stream(device):
            if self.graph is not None:
                self.graph.replay()
            elif device.type == "cuda" and self.steps >= self.warmup_steps:
                self._capture()
            else:
                self.result = self._run()
        self.steps += 1
        numbers, outputs, info = self.result
        # The next step writes to these.
        return rebuilt(numbers.clone(), outputs), info

    def release(self) -> None:
        """Back to steps without it.

        Also before a process group is left: NCCL waits there until no graph has its operations any more (NVIDIA's notes on
        CUDA graphs; pytorch issue 115388).
        """
        if self.graph is not None:
            torch.cuda.synchronize(self.engine.device)
        self.graph = self.result = self.batch = None
        self.engine.discard()

    def _fill(self, batch: Batch, rng: Tensor, lr: float, momentum: float) -> None:
        given = to_device(batch, self.engine.device)
        if self.batch is None:
            self.batch, self.rng = Batch(tuple(crop.clone() for crop in given.crops), given.ids.clone()), rng
            self.engine.set_lr(self.lr)
        else:
            for place, tensor in zip((*self.batch.crops, self.batch.ids), (*given.crops, given.ids)):
                if place.shape != tensor.shape:
                    raise GraphError(f"--graph: expected batches of one shape, {place.shape}, got {tensor.shape}")
                place.copy_(tensor)
        self.lr.fill_(lr)
        self.momentum.fill_(momentum)

    def _run(self) -> tuple[Tensor, list[StepOutput], StepInfo]:
        outputs = self.program.gradient(self.batch, self.rng)
        info = self.program.update(self.rng, self.momentum)
        return flat(outputs), outputs, info

    def _capture(self) -> None:
        expected = self._expected()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads pin memory for the loader meanwhile.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                result = self._run()
        except RuntimeError as e:
            self.engine.discard()
            # The end of a capture that failed raises, too: the reason is what was raised before.
            reason = e.__context__ if isinstance(e.__context__, RuntimeError) else e
            raise CaptureError(f"--graph: the step cannot be captured: {str(reason).splitlines()[0]}") from e
        self.graph, self.result = graph, result
        graph.replay()
        found = self._measured(result[1], result[2].grad_norm)
        for name, ours, theirs in zip(("loss", "norm of the gradient"), found, expected):
            if theirs.isfinite() and not (ours - theirs).abs() <= TOLERANCE * theirs.abs():
                raise GraphError(
                    f"--graph: expected {name} {theirs:.6g}, as without a graph, got {ours:.6g}; use --graph off, and "
                    f"--resume from before this step"
                )

    def _expected(self) -> Tensor:
        """What the step to be captured gives without a graph, and without its update."""
        outputs = self.program.gradient(self.batch, self.rng)
        expected = self._measured(outputs, self.engine.discard())
        return expected

    @staticmethod
    def _measured(outputs: list[StepOutput], norm: Tensor) -> Tensor:
        """(2,) on the host: mean loss, norm of the gradient."""
        return torch.stack([torch.stack([out.loss.float() for out in outputs]).mean(), norm.float()]).cpu()


def flat(outputs: list[StepOutput]) -> Tensor:
    """All numbers of all micro-batches as one vector."""
    numbers = [n for out in outputs for n in (out.loss, *out.parts.values(), *out.measures.values())]
    return torch.stack([n.detach().float() for n in numbers])


def rebuilt(numbers: Tensor, like: list[StepOutput]) -> list[StepOutput]:
    """The inverse of `flat`."""
    each = iter(numbers.unbind())
    return [
        StepOutput(next(each), {n: next(each) for n in out.parts}, {n: next(each) for n in out.measures})
        for out in like
    ]
