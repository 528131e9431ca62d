"""Token gather in C++: rows are copied; in the gradient, each row is copied or cleared once."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define
from . import reference

_gather = native_library.function("gather_tokens")
_scatter = native_library.function("scatter_tokens")


def _forward(x: Tensor, ids: Tensor) -> Tensor:
    batch, count, width = x.shape
    # Rows are read as they lie; only a strided row has to be copied first.
    x, ids = x if x.stride(2) == 1 else x.contiguous(), ids.contiguous()
    out = x.new_empty((*ids.shape, width))
    size = x.element_size()
    strides = x.stride(0) * size, x.stride(1) * size
    _gather(x, *strides, ids, batch, count, ids.shape[1], width * size, out, torch.get_num_threads())
    return out


def _backward(grad: Tensor, ids: Tensor, count: int) -> Tensor:
    batch, keep, width = grad.shape
    grad, ids = grad.contiguous(), ids.contiguous()
    out = grad.new_empty((batch, count, width))
    dtype = native_library.DTYPES[grad.dtype]
    _scatter(grad, ids, batch, count, keep, width, dtype, out, torch.get_num_threads())
    return out


def _save(ctx, inputs, output) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.count = x.shape[1]


def _save_ids(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


_scatter_op = define(
    "native_gather_tokens_backward(Tensor grad, Tensor ids, SymInt count) -> Tensor",
    _backward,
    lambda grad, ids, count: grad.new_empty((grad.shape[0], count, grad.shape[2])),
    backward=lambda ctx, grad: (_op(grad, *ctx.saved_tensors), None, None),
    save=_save_ids,
)
_op = define(
    "native_gather_tokens(Tensor x, Tensor ids) -> Tensor",
    _forward,
    lambda x, ids: x.new_empty((*ids.shape, x.shape[2])),
    backward=lambda ctx, grad: (_scatter_op(grad, *ctx.saved_tensors, ctx.count), None),
    save=_save,
)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """See the public function. Other dtypes than float32, bfloat16 and float16 are left to the reference."""
    if x.dtype not in native_library.FLOATS:
        return reference.gather_tokens(x, ids)
    return _op(x, ids)
