"""torch.autocast on any device: it does not know all of them, and raises where it is asked about another (meta)."""

import contextlib

import torch

KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu")


def disabled(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside it nothing is converted."""
    return torch.autocast(device.type, enabled=False) if device.type in KNOWN else contextlib.nullcontext()


def dtype(device: torch.device) -> torch.dtype | None:
    """What products on ``device`` are computed in; None where autocast is off."""
    is_on = device.type in KNOWN and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None
