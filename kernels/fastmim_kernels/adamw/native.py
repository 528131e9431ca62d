"""AdamW and what follows it in C++: each value is read once and written once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native_library

_adamw_ema = native_library.function("adamw_ema")


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: Tensor,
) -> None:
    """Tensors whose values do not lie alike in memory, without gaps, are updated as contiguous copies."""
    kept = [params, exp_avgs, exp_avg_sqs, targets, copies]
    dense = [[t.contiguous() for t in tensors] for tensors in kept]
    grads = [g.contiguous() for g in grads]
    lists = [dense[0], grads, *dense[1:]]
    addresses = [native_library.integers(*(t.data_ptr() for t in ts)) if ts else None for ts in lists]
    kinds = [
        native_library.DTYPES[ts[0].dtype] if ts else native_library.DTYPES[torch.float32] for ts in (grads, copies)
    ]
    _adamw_ema(
        addresses[0], addresses[1], kinds[0], addresses[2], addresses[3], addresses[4], addresses[5], kinds[1],
        native_library.integers(*(p.numel() for p in params)), len(params), *numbers.tolist(), torch.get_num_threads(),
    )  # fmt: skip
    for tensors, written in zip(kept, dense, strict=True):
        for tensor, copy in zip(tensors, written, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
