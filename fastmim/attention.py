"""Which implementation computes attention: ours on CPUs, on GPUs the one that is fastest at a method's own sizes.

`choose` measures once, before training; sizes that it has not seen are left to torch's own choice.
FASTMIM_ATTENTION=<name> takes one implementation for all sizes. All take tokens where the
projection left them, (B, N, heads, d), without permuted copies.
"""

import contextlib
import functools
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from fastmim_kernels import dispatch, qkv_attention
from fastmim_kernels.qkv import ATTENTION, LONGEST
from fastmim_kernels.qkv import attention as by_head
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmim.config import ConfigError, nearest

VARIABLE = "FASTMIM_ATTENTION"
# Timed calls per candidate after the first two; the median counts.
REPEATS = 10
# A few milliseconds of a GPU, longer than the host takes to start a call and its gradient.
QUEUE_CYCLES = 10_000_000

Tokens = Callable[[Tensor, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """What the fastest implementation depends on."""

    device: str
    dtype: torch.dtype
    queries: int
    keys: int
    heads: int
    width: int
    has_grad: bool

    def __str__(self) -> str:
        passes = "forward and backward" if self.has_grad else "forward"
        return f"{self.queries} x {self.keys} tokens, {self.heads} heads of {self.width}, {passes}"


class Candidate(NamedTuple):
    """An implementation.

    Args:
        compute: (B, M, heads, d) queries, (B, N, heads, d) keys and values -> (B, M, heads, d).
        devices: types of device that have it.
        package: what has to be installed for it besides torch.
        cudnn: the least version of cuDNN that it needs, as torch tells it.
    """

    compute: Tokens
    devices: tuple[str, ...]
    package: str = ""
    cudnn: int = 0

    def is_on(self, device: str) -> bool:
        is_there = not self.package or importlib.util.find_spec(self.package) is not None
        return device in self.devices and is_there and (torch.backends.cudnn.version() or 0) >= self.cudnn


def _heads_first(compute: Tokens, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By a function of (B, heads, N, d): views of the tokens, not copies."""
    return compute(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _torch_with(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return _heads_first(F.scaled_dot_product_attention, q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


# "kernels" is fastmim_kernels' own (qkv/), which has no part for GPUs. Among equals the first is taken: on Hopper cuDNN's
# is 1.1 to 1.4 times as fast as flash at 500 to 2000 tokens (TransformerEngine's tables).
CANDIDATES: dict[str, Candidate] = {
    "kernels": Candidate(functools.partial(_heads_first, by_head), ("cpu",)),
    # Before 9.15.1 cuDNN's backward pass may write elsewhere where 128 does not divide the number of keys (pytorch issue
    # 169849); torch's own choice then leaves it out, but not where it is named.
    "cudnn": Candidate(functools.partial(_torch_with, SDPBackend.CUDNN_ATTENTION), ("cuda",), cudnn=91501),
    "flash": Candidate(functools.partial(_torch_with, SDPBackend.FLASH_ATTENTION), ("cuda", "cpu")),
    "efficient": Candidate(functools.partial(_torch_with, SDPBackend.EFFICIENT_ATTENTION), ("cuda",)),
    "xformers": Candidate(_xformers, ("cuda",), "xformers"),
    "math": Candidate(functools.partial(_torch_with, SDPBackend.MATH), ("cuda", "cpu")),
    # Whatever torch takes: never refuses.
    "torch": Candidate(functools.partial(_heads_first, F.scaled_dot_product_attention), ("cuda", "cpu")),
}
# Size -> name, filled by `choose`.
CHOSEN: dict[Size, str] = {}
# See `as_on_gpus`.
_as_on_gpus = False
# Where `choose` collects sizes, and the batches that they come in, while it runs a step; None: nowhere.
_seen: dict[Size, int] | None = None


class Biased(NamedTuple):
    """Attention of (B, heads, N, d) tensors with numbers added to the scores of every image. Blocks know it, and hand its
    bias to the kernel for packed projections instead of calling it.

    Args:
        bias: (heads, N, N), rows are queries.
    """

    bias: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_head(q, k, v, self.bias)


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """Within it, attention of tensors without values keeps what fused kernels keep on GPUs: no tables of scores."""
    global _as_on_gpus
    before, _as_on_gpus = _as_on_gpus, True
    try:
        yield
    finally:
        _as_on_gpus = before


def attend_packed(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """Self-attention of (B, N, 3, heads, d) -> (B, N, heads, d); bias: see `Biased`."""
    if _as_on_gpus:
        return ATTENTION(qkv, bias)[0]
    if bias is None:
        name = name_for(qkv, qkv.shape[1], qkv.shape[1])
        return qkv_attention(qkv) if name == "kernels" else CANDIDATES[name].compute(*qkv.unbind(2))
    # Of the others, torch's own alone takes a bias.
    if default_of(qkv.device.type) == "kernels":
        return qkv_attention(qkv, bias)
    return _heads_first(Biased(bias), *qkv.unbind(2))


def attend_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (B, M, heads, d) to keys and values (B, N, heads, d) -> (B, M, heads, d)."""
    return CANDIDATES[name_for(q, q.shape[1], k.shape[1])].compute(q, k, v)


def takes_packed(tokens: Tensor) -> bool:
    """Whether self-attention of tokens (B, N, ...) has a compiled kernel of ours, which takes packed projections alone."""
    device = tokens.device.type
    is_low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if _as_on_gpus or device != "cpu" or tokens.shape[1] > LONGEST or not (is_low or tokens.dtype == torch.bfloat16):
        return False
    return default_of(device) == "kernels" and not dispatch.uses_reference("qkv", tokens.device, torch.bfloat16)


def name_for(x: Tensor, queries: int, keys: int) -> str:
    """The implementation for projections x (B, ..., heads, d) of so many tokens."""
    if x.device.type == "cpu":
        return "flash" if _as_on_gpus else default_of("cpu")
    return _chosen(x.device.type, x.dtype, torch.is_grad_enabled(), len(x), queries, keys, *x.shape[-2:])


# A constant of a compiled graph, which is traced once per shape.
@torch.compiler.assume_constant_result
def _chosen(
    device: str, dtype: torch.dtype, has_grad: bool, batch: int, queries: int, keys: int, heads: int, width: int
) -> str:
    size = Size(device, dtype, queries, keys, heads, width, has_grad)
    if _seen is not None:
        _seen[size] = max(batch, _seen.get(size, 0))
    return default_of(device) if os.environ.get(VARIABLE) else CHOSEN.get(size) or default_of(device)


@torch.compiler.assume_constant_result
def default_of(device: str) -> str:
    """What FASTMIM_ATTENTION names, or what is taken without a measurement.

    Raises:
        ConfigError: the variable names an implementation that does not exist or that the device does not have.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return "kernels" if device == "cpu" else "torch"
    if wanted not in CANDIDATES:
        names = list(CANDIDATES)
        raise ConfigError(f"{VARIABLE}: expected one of {', '.join(names)}, got {wanted}{nearest(wanted, names)}")
    if not CANDIDATES[wanted].is_on(device):
        names = [name for name, candidate in CANDIDATES.items() if candidate.is_on(device)]
        raise ConfigError(f"{VARIABLE}: expected one of {', '.join(names)} on this {device} device, got {wanted}")
    return wanted


def choose(step: Callable[[], object], device: str) -> list[str]:
    """Measures the implementations at the sizes that a step asks for, and says what is taken.

    Args:
        step: a forward pass as in training, without torch.compile; it is run once. Not called where there is no choice.
        device: its type.
    """
    global _seen
    if device == "cpu" or os.environ.get(VARIABLE):
        return [f"attention {default_of(device)}" + f" ({VARIABLE})" * bool(os.environ.get(VARIABLE))]
    _seen = {}
    try:
        step()
        sizes = _seen
    finally:
        _seen = None
    return [measure(size, batch) for size, batch in sizes.items()]


def measure(size: Size, batch: int) -> str:
    """Times all implementations that the device has at one size, remembers the fastest, and returns a line about it."""
    times = {}
    for name, candidate in CANDIDATES.items():
        if candidate.is_on(size.device):
            try:
                times[name] = seconds_of(candidate.compute, size, batch)
            except (RuntimeError, ValueError, NotImplementedError):
                # Torch's and xformers' ways to say that they have no kernel for the size, the dtype or the device.
                times[name] = math.inf
    CHOSEN[size] = min(times, key=times.get)
    found = ", ".join(f"{name} {1e3 * t:.2f}" for name, t in times.items() if t < math.inf)
    return f"attention {CHOSEN[size]} for {size} (ms: {found})"


def seconds_of(compute: Tokens, size: Size, batch: int) -> float:
    """Median time of a call, with its backward pass if there is one, on a packed projection's views."""

    def draw(tokens: int, parts: int) -> Tensor:
        shape = (batch, tokens, parts, size.heads, size.width)
        return torch.randn(shape, device=size.device, dtype=size.dtype).requires_grad_(size.has_grad)

    if size.queries == size.keys:
        q, k, v = draw(size.keys, 3).unbind(2)
    else:
        q, (k, v) = draw(size.queries, 1).squeeze(2), draw(size.keys, 2).unbind(2)
    grad = torch.ones(q.shape, device=size.device, dtype=size.dtype)

    def step() -> None:
        with torch.set_grad_enabled(size.has_grad):
            out = compute(q, k, v)
        if size.has_grad:
            out.backward(grad, retain_graph=True)

    clock = _device_seconds if size.device == "cuda" else _host_seconds
    return statistics.median([clock(step) for _ in range(2 + REPEATS)][2:])


def _host_seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _device_seconds(step: Callable[[], None]) -> float:
    """Without what the host takes to start it, of which a graph has none: the device is kept busy until all is queued."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE_CYCLES)
    began.record()
    step()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3
