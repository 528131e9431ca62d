"""Tables of numbers on the device, through which one launch takes many tensors: their addresses, sizes and the like."""

from collections import OrderedDict

import torch
from torch import Tensor

MOST_KEPT = 64
# Pinned numbers that are ready for captures: AdamW of a thousand tensors takes eight thousand.
RESERVE = 1 << 16

_kept: OrderedDict[tuple[tuple[int, ...], torch.device], Tensor] = OrderedDict()
_reserve = torch.empty(0, dtype=torch.int64)
# What captured graphs read when they are replayed, which may be at any time: never freed.
_captured: list[Tensor] = []


def address_table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """(len(numbers),) int64 on the device; the host does not wait for it.

    In a CUDA graph, too, where gradients lie elsewhere than before, and copies from pageable memory are not allowed: there
    the numbers go through pinned memory that stays, and each replay copies them anew.

    Raises: RuntimeError in a capture before which nothing of this size was computed: pinned memory cannot be made in it.
    """
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _kept.get((numbers, device))
    if table is not None:
        _kept.move_to_end((numbers, device))
        if is_captured:
            _captured.append(table)
        return table
    if is_captured:
        return _staged(numbers, device)
    _replenish(len(numbers), device)
    table = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    _kept[numbers, device] = table
    if len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    return table


def _replenish(count: int, device: torch.device) -> None:
    """Sees to it that a capture finds pinned memory for some tables of that size."""
    global _reserve
    if device.type == "cuda" and len(_reserve) < max(RESERVE, 4 * count):
        _reserve = torch.empty(2 * max(RESERVE, 4 * count), dtype=torch.int64, pin_memory=True)


def _staged(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    global _reserve
    if len(_reserve) < len(numbers):
        raise RuntimeError(
            f"CUDA graph: expected a step like this one before the capture, got a first table of {len(numbers)} numbers "
            "in it; take some steps first"
        )
    host, _reserve = _reserve[: len(numbers)], _reserve[len(numbers) :]
    host.copy_(torch.tensor(numbers, dtype=torch.int64))
    _captured.append(host)
    table = torch.empty(len(numbers), dtype=torch.int64, device=device)
    return table.copy_(host, non_blocking=True)
