"""Depthwise convolution in C++: an image's map lives in cache, and only pixels of visible patches are computed."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import native_library
from ..registration import define
from . import reference

_forward = native_library.function("depthwise")
_backward = native_library.function("depthwise_backward")
_LANES = 16


def _sizes(x: Tensor, weight: Tensor, grid: list[int]):
    return native_library.integers(x.shape[0], x.shape[1], x.shape[2], x.shape[4], *grid, weight.shape[2])


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k * k, C rounded up) float32."""
    width = weight.shape[0]
    return pad(weight.reshape(width, -1).t().float(), (0, -width % _LANES)).contiguous()


def _compute(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: list[int]) -> Tensor:
    x, ids = x.contiguous(), None if ids is None else ids.contiguous()
    out = torch.empty_like(x)
    start = pad(bias.float(), (0, -len(bias) % _LANES)).contiguous()
    kind, threads = native_library.DTYPES[x.dtype], torch.get_num_threads()
    _forward(x, ids, _taps(weight), start, _sizes(x, weight, grid), out, kind, threads)
    return out


def _compute_backward(
    grad: Tensor, x: Tensor, ids: Tensor | None, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, ids = grad.contiguous(), x.contiguous(), None if ids is None else ids.contiguous()
    width, _, size, _ = weight.shape
    x_grad = torch.empty_like(x)
    sums = x.new_empty((size * size + 1, width + -width % _LANES), dtype=torch.float32)
    kind, threads = native_library.DTYPES[x.dtype], torch.get_num_threads()
    _backward(grad, x, ids, _taps(weight.flip(2, 3)), _sizes(x, weight, grid), x_grad, sums, kind, threads)
    weight_grad = sums[:-1, :width].t().reshape(weight.shape)
    return x_grad, weight_grad.contiguous(), sums[-1, :width].clone()


_op_backward = define(
    "native_depthwise_backward(Tensor grad, Tensor x, Tensor? ids, Tensor weight, SymInt[] grid)"
    " -> (Tensor, Tensor, Tensor)",
    _compute_backward,
    lambda grad, x, ids, weight, grid: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
        weight.new_empty((weight.shape[0],), dtype=torch.float32),
    ),
)


def _save(ctx, inputs, output) -> None:
    x, ids, weight, bias, grid = inputs
    ctx.save_for_backward(x, ids, weight)
    ctx.grid, ctx.bias_dtype = grid, bias.dtype


def _gradients(ctx, grad):
    x, ids, weight = ctx.saved_tensors
    x_grad, weight_grad, bias_grad = _op_backward(grad, x, ids, weight, ctx.grid)
    return x_grad, None, weight_grad.to(weight.dtype), bias_grad.to(ctx.bias_dtype), None


_op = define(
    "native_depthwise(Tensor x, Tensor? ids, Tensor weight, Tensor bias, SymInt[] grid) -> Tensor",
    _compute,
    lambda x, ids, weight, bias, grid: x.new_empty(x.shape),
    backward=_gradients,
    save=_save,
)


def depthwise_patches(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """See the public function. float64 is left to the reference."""
    if any(t.dtype not in native_library.FLOATS for t in (x, weight, bias)):
        return reference.depthwise_patches(x, ids, weight, bias, grid)
    return _op(x, ids, weight, bias, grid)
