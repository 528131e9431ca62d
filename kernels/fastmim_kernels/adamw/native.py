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
    weight_decays: Sequence[float],
) -> None:
    """Tensors whose values do not lie alike in memory, without gaps, are updated as contiguous copies."""
    kept = [params, exp_avgs, exp_avg_sqs, targets, copies]
    dense = [[t.contiguous() for t in tensors] for tensors in kept]
    grads = [g.contiguous() for g in grads]
    # An empty tensor has the address 0.
    addresses = [native_library.integers(*(t.data_ptr() for t in ts)) for ts in (dense[0], grads, *dense[1:])]
    lr, *rest = numbers.tolist()
    decays = torch.tensor([1 - lr * d for d in weight_decays], dtype=torch.float64)
    _adamw_ema(
        addresses[0], addresses[1], native_library.DTYPES[grads[0].dtype], *addresses[2:],
        native_library.DTYPES[copies[0].dtype], native_library.integers(*(p.numel() for p in params)), decays,
        len(params), *rest, torch.get_num_threads(),
    )  # fmt: skip
    for tensors, written in zip(kept, dense, strict=True):
        for tensor, copy in zip(tensors, written, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
