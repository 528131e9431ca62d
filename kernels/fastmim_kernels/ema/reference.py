"""EMA as one multi-tensor lerp."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float | Tensor) -> None:
    """See the public function."""
    pairs = list(zip(targets, onlines, strict=True))
    # On a CPU one after the other, which takes no longer: of wider copies only one exists at a time, in the cache.
    for group in [[pair] for pair in pairs] if pairs and pairs[0][0].device.type == "cpu" else [pairs]:
        ends = [o.to(t.dtype) for t, o in group]
        weights = [(1 - momentum).to(t.dtype) for t, _ in group] if isinstance(momentum, Tensor) else 1 - momentum
        torch._foreach_lerp_([t for t, _ in group], ends, weights)
