"""Token gather in C++: rows are copied; in the gradient, each row is copied or cleared once."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate, allocate_backward

_gather = native_library.function("gather_tokens")
_scatter = native_library.function("scatter_tokens")


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    out = allocate(x, ids)
    batch, length, width = x.shape
    # Rows are read as they lie; only a strided row has to be copied first.
    x, ids = x if x.stride(2) == 1 else x.contiguous(), ids.contiguous()
    size = x.element_size()
    strides = x.stride(0) * size, x.stride(1) * size
    _gather(x, *strides, ids, batch, length, ids.shape[1], width * size, out, torch.get_num_threads())
    return out


def gather_tokens_backward(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    out = allocate_backward(grad, ids, length)
    batch, keep, width = grad.shape
    dtype = native_library.DTYPES[grad.dtype]
    _scatter(grad.contiguous(), ids.contiguous(), batch, length, keep, width, dtype, out, torch.get_num_threads())
    return out
