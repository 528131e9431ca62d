"""Decoder input in C++: one pass over the result; in the gradient, one over the incoming gradient (two with pos)."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate, allocate_backward

_restore = native_library.function("restore_tokens")
_restore_backward = native_library.function("restore_tokens_backward")


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    out = allocate(x, mask_token, pos, ids_restore, num_prefix)
    batch, tokens, width = x.shape
    # Rows are read as they lie; only a strided row has to be copied first.
    x = x if x.stride(2) == 1 else x.contiguous()
    mask_token, pos = mask_token.float().contiguous(), pos.float().contiguous()
    _restore(
        x, x.stride(0), x.stride(1), native_library.DTYPES[x.dtype], mask_token, pos, ids_restore.contiguous(), batch,
        ids_restore.shape[1], tokens - num_prefix, num_prefix, width, out, native_library.DTYPES[out.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def restore_tokens_backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    outs = allocate_backward(grad, ids_restore, tokens, num_prefix, dtype, wanted)
    for_x, for_mask, for_pos = (out if w else None for out, w in zip(outs, wanted, strict=True))
    grad, ids_restore = grad.contiguous(), ids_restore.contiguous()
    _restore_backward(
        grad, native_library.DTYPES[grad.dtype], ids_restore, len(grad), ids_restore.shape[1], tokens - num_prefix,
        num_prefix, grad.shape[2], for_x, native_library.DTYPES[dtype], for_mask, for_pos, torch.get_num_threads(),
    )  # fmt: skip
    return outs
