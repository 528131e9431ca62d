"""What all Triton kernels share on the host: registration of their ops, and launch settings."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registration


def define_triton(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``registration.define`` for CUDA tensors, or for CPU tensors where Triton runs in its interpreter.

    Without ``backward`` the op raises where a gradient of it is asked for; torch's default is to warn and go wrong.
    """
    if backward is None and "!" not in schema:
        backward = registration.no_second_derivative(schema.partition("(")[0])
    if os.environ.get("TRITON_INTERPRET") == "1":
        return registration.define(schema, run, fake, device_type="cpu", backward=backward, save=save)
    return registration.define(schema, on_device_of_inputs(run), fake, device_type="cuda", backward=backward, save=save)


def on_device_of_inputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(run)
    def guarded(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor) or (isinstance(arg, list) and arg))
        device = (first if isinstance(first, Tensor) else first[0]).device
        if device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return guarded


def row_config(width: int, itemsize: int) -> dict[str, int]:
    """Launch settings of kernels that move rows: BLOCK values at a time, 16 bytes per thread and load.

    One warp moves 512 bytes per load. With one to four loads in flight per thread, the 32 to 64 warps of a
    multiprocessor keep the 32 KB in flight that the memory of an H100 or H200 needs (bandwidth x latency).
    """
    block = min(next_power_of_2(width), 4096)
    return {"BLOCK": block, "num_warps": max(1, min(8, block * itemsize // 2048))}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
