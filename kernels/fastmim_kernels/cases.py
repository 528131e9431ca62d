"""What a spec.py is made of, and how a case is judged. One test and one benchmark run every case of every op."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of a public function on made-up inputs.

    ``spec.py`` of an op holds two tuples: CASES (small, odd sizes, for the test) and BENCH (real sizes, for the
    benchmark).
    """

    name: str  # carries the shapes
    function: str  # name of the public function in fastmim_kernels
    inputs: Callable[[torch.device], Inputs]  # the same values at every call, on every device
    tolerance: float = 0.0  # largest error allowed, in units of max(1, |truth|); 0 = bit for bit
    grads: tuple[str, ...] = ()  # arguments whose gradient is compared as well
    result: tuple[str, ...] = ()  # the arguments that hold the results of an op that works in place
    bytes_moved: int = 0  # least traffic: every input byte needed read once, every output byte written once
    flops: int = 0  # 1 multiply-add = 2
    truth: Callable[..., Any] | None = (
        None  # gives it from inputs in float64, where the reference would lose a dtype by that
    )


def load(op: str) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """(CASES, BENCH) of an op."""
    spec = importlib.import_module(f"{dispatch.PACKAGE}.{op}.spec")
    return spec.CASES, spec.BENCH


def public(case: Case) -> Callable[..., Any]:
    """The public function of a case."""
    return getattr(importlib.import_module(dispatch.PACKAGE), case.function)


def generator(seed: int) -> torch.Generator:
    """CPU generator for inputs: drawn there and moved, so that every device sees the same values."""
    return torch.Generator().manual_seed(seed)


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` applied to the tensors and dtypes inside dicts, lists, tuples and NamedTuples; all else is kept."""
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value) if isinstance(value, (Tensor, torch.dtype)) else value


def upcast(value: Any) -> Any:
    """A copy with every floating tensor and dtype in float64: what the truth is computed from."""

    def change(item: Any) -> Any:
        if isinstance(item, torch.dtype):
            return torch.float64 if item.is_floating_point else item
        return item.detach().to(torch.float64 if item.is_floating_point() else item.dtype, copy=True)

    return map_tensors(value, change)


def flatten(value: Any) -> list[Tensor]:
    """All tensors inside ``value``."""
    found: list[Tensor] = []
    map_tensors(value, lambda item: found.append(item) or item)
    return found


def call(function: Callable[..., Any], case: Case, inputs: Inputs) -> list[Tensor]:
    """Results of one call, then the gradients of their weighted sum with respect to ``case.grads``."""
    sources = [inputs[name].requires_grad_() for name in case.grads]
    returned = function(**inputs)
    outputs = flatten([inputs[name] for name in case.result] if case.result else returned)
    if not sources:
        return outputs
    # Small integer weights, exact in every dtype. Some outputs are for reading only.
    ends = [o for o in outputs if o.requires_grad]
    weights = [(torch.arange(o.numel(), device=o.device) % 7 - 3).view(o.shape).to(o.dtype) for o in ends]
    gradients = torch.autograd.grad(ends, sources, weights)
    return [*(o.detach() for o in outputs), *gradients]


def error(case: Case, device: torch.device) -> float:
    """Largest error of the public function against the op's reference in float64, in units of max(1, |truth|).

    Memory that torch allocates without filling it is poisoned meanwhile (NaN, or the largest integer).
    """
    op = public(case).__module__.rpartition(".")[2]
    reference = getattr(importlib.import_module(f"{dispatch.PACKAGE}.{op}.reference"), case.function)
    with poisoned():
        got = call(public(case), case, case.inputs(device))
    truth = call(case.truth or reference, case, upcast(case.inputs(device)))
    worst = 0.0
    for g, t in zip(got, truth, strict=True):
        if g.shape != t.shape:
            raise AssertionError(
                f"{case.function} {case.name}: expected shape {tuple(t.shape)}, got {tuple(g.shape)}; correct the op."
            )
        if g.numel():
            difference = (g.double() - t.double()).abs() / t.double().abs().clamp_min(1)
            worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
    return worst


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, through torch's deterministic mode (which only warns of ops that it lacks)."""
    before = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns_only)
