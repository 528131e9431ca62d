"""EMA as one multi-tensor lerp."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float | Tensor) -> None:
    """See the public function."""
    targets = list(targets)
    onlines = [o.to(t.dtype) for t, o in zip(targets, onlines, strict=True)]
    if isinstance(momentum, Tensor):
        torch._foreach_lerp_(targets, onlines, [(1 - momentum).to(t.dtype) for t in targets])
    else:
        torch._foreach_lerp_(targets, onlines, 1 - momentum)
