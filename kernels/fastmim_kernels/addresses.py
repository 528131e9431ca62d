"""Tables of numbers on the device, through which one launch takes many tensors: their addresses, sizes and the like."""

import functools

import torch
from torch import Tensor

# Pinned numbers that are ready for captures: AdamW of a thousand tensors takes eight thousand.
RESERVE = 1 << 16

# "cpu" wherever memory of the host is meant: torch.set_default_device changes what is left unsaid.
_reserve = torch.empty(0, dtype=torch.int64, device="cpu")
# What captured graphs copy when they are replayed, which may be at any time: never freed.
_captured: dict[tuple[int, ...], Tensor] = {}


def address_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """(len(numbers),) int64 on the device; the host does not wait for it.

    In a CUDA graph, too, where gradients lie elsewhere than before, and copies from pageable memory are not allowed: there
    the numbers go through pinned memory that stays, and each replay copies them anew.

    Raises: RuntimeError in a capture before which nothing of this size was computed: pinned memory cannot be made in it.
    """
    if device.type != "cuda":
        return _kept(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _staged(numbers, device)
    _replenish(len(numbers))
    # Of its stream alone, on which the copy comes before whatever reads it.
    return _kept(numbers, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _kept(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _replenish(count: int) -> None:
    """Sees to it that a capture finds pinned memory for some tables of that size."""
    global _reserve
    least = max(RESERVE, 4 * count)
    if len(_reserve) < least:
        _reserve = torch.empty(2 * least, dtype=torch.int64, device="cpu", pin_memory=True)


def _staged(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    global _reserve
    if numbers not in _captured:
        if len(_reserve) < len(numbers):
            raise RuntimeError(
                f"CUDA graph: expected a step like this one before the capture, got a first table of {len(numbers)} "
                "numbers in it; take some steps first"
            )
        host, _reserve = _reserve[: len(numbers)], _reserve[len(numbers) :]
        _captured[numbers] = host.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    table = torch.empty(len(numbers), dtype=torch.int64, device=device)
    return table.copy_(_captured[numbers], non_blocking=True)
