"""Depthwise convolution in C++: an image's map lives in cache, and only pixels of visible patches are computed."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import native_library
from . import allocate, allocate_backward

_forward = native_library.function("depthwise")
_backward = native_library.function("depthwise_backward")
_LANES = 16


def _sizes(x: Tensor, weight: Tensor, grid: list[int]):
    return native_library.integers(x.shape[0], x.shape[1], x.shape[2], x.shape[4], *grid, weight.shape[2])


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k * k, C rounded up) float32."""
    width = weight.shape[0]
    return pad(weight.reshape(width, -1).t().float(), (0, -width % _LANES)).contiguous()


def depthwise_patches(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: list[int]) -> Tensor:
    x, ids = x.contiguous(), None if ids is None else ids.contiguous()
    out = allocate(x, ids, weight, bias, grid)
    start = pad(bias.float(), (0, -len(bias) % _LANES)).contiguous()
    kind, threads = native_library.DTYPES[x.dtype], torch.get_num_threads()
    _forward(x, ids, _taps(weight), start, _sizes(x, weight, grid), out, kind, threads)
    return out


def depthwise_patches_backward(
    grad: Tensor, x: Tensor, ids: Tensor | None, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, ids = grad.contiguous(), x.contiguous(), None if ids is None else ids.contiguous()
    width, _, size, _ = weight.shape
    x_grad, weight_grad, bias_grad = allocate_backward(grad, x, ids, weight, grid)
    sums = x.new_empty((size * size + 1, width + -width % _LANES), dtype=torch.float32)
    kind, threads = native_library.DTYPES[x.dtype], torch.get_num_threads()
    _backward(grad, x, ids, _taps(weight.flip(2, 3)), _sizes(x, weight, grid), x_grad, sums, kind, threads)
    weight_grad.view(width, -1).copy_(sums[:-1, :width].t())
    return x_grad, weight_grad, bias_grad.copy_(sums[-1, :width])
