"""Depthwise convolution of an image of which only some patches are visible, on the patches' own pixels."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_distinct, check_grid, check_ids, check_rank, fail, is_float
from ..registration import define

__all__ = ["depthwise_patches"]


def depthwise_patches(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convolve each channel with its own odd kernel, with zeros at masked patches and around the image.

    In plain torch, with ``h, w = grid`` and ``image = arange(B)[:, None]``: ``tiles = zeros(B, h * w, s, s, C)``;
    ``tiles[image, ids] = x``; ``map = tiles.view(B, h, w, s, s, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, h * s, w * s)``;
    ``map = F.conv2d(map, weight, bias, padding="same", groups=C)``; ``map.view(B, C, h, s, w, s).permute(0, 2, 4, 3, 5,
    1).reshape(B, h * w, s, s, C)[image, ids]``. Sums are made in float32 or wider.

    Args:
        x: (B, K, s, s, C) feature maps of the visible patches, s x s pixels each.
        ids: (B, K) int64, their places in the grid, no place twice (checked on the CPU only); None: all of them, in
            raster order.
        weight: (C, 1, k, k), k odd. bias: (C,).
        grid: patches per column and per row.

    Returns: (B, K, s, s, C) in the dtype of x. Differentiable with respect to x, weight and bias.
    Raises: ValueError, TypeError or IndexError for arguments that do not fit each other.
    Source: Alpha-VL/ConvMAE models_convmae.py, whose mask multiplies the input of its depthwise convolutions.
    """
    check_rank("x", x, "(B, K, s, s, C)")
    check_rank("weight", weight, "(C, 1, k, k)")
    check_rank("bias", bias, "(C,)")
    batch, keep, side, other, width = x.shape
    h, w = check_grid("grid", grid)
    count = h * w
    if side != other or not is_float(x):
        raise fail("x", "floats (B, K, s, s, C)", f"{x.dtype} {tuple(x.shape)}", "give square patches", TypeError)
    if ids is not None:
        check_ids("ids", ids, batch, count, x.device)
        check_distinct("ids", ids, count)
    if keep != (count if ids is None else ids.shape[1]):
        raise fail("x", "one patch per id (all of the grid without ids)", f"{keep} patches", "check x, ids and grid")
    size = weight.shape[2]
    if tuple(weight.shape) != (width, 1, size, size) or size % 2 == 0 or tuple(bias.shape) != (width,):
        got = f"{tuple(weight.shape)}, {tuple(bias.shape)}"
        raise fail("weight, bias", f"({width}, 1, k, k) with odd k, ({width},)", got, "give one kernel per channel")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.device != x.device or not is_float(tensor):
            got = f"{tensor.dtype} on {tensor.device}"
            raise fail(name, f"floats on {x.device} like x", got, "move or convert it", TypeError)
    if dispatch.uses_reference("depthwise", x.device, x, weight, bias):
        return dispatch.reference("depthwise").depthwise_patches(x, ids, weight, bias, grid)
    return DEPTHWISE(x, ids, weight, bias, grid)


def allocate(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: list[int]) -> Tensor:
    return x.new_empty(x.shape)


def allocate_backward(
    grad: Tensor, x: Tensor, ids: Tensor | None, weight: Tensor, grid: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (weight.shape, weight.shape[:1])
    return x.new_empty(x.shape), *(weight.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output) -> None:
    x, ids, weight, bias, grid = inputs
    ctx.save_for_backward(x, ids, weight)
    ctx.grid, ctx.bias_dtype = grid, bias.dtype


def _backward(ctx, grad):
    x, ids, weight = ctx.saved_tensors
    x_grad, weight_grad, bias_grad = DEPTHWISE_BACKWARD(grad, x, ids, weight, ctx.grid)
    return x_grad, None, weight_grad.to(weight.dtype), bias_grad.to(ctx.bias_dtype), None


DEPTHWISE_BACKWARD = define(
    "depthwise",
    "depthwise_patches_backward(Tensor grad, Tensor x, Tensor? ids, Tensor weight, SymInt[] grid)"
    " -> (Tensor, Tensor, Tensor)",
    allocate_backward,
)
DEPTHWISE = define(
    "depthwise",
    "depthwise_patches(Tensor x, Tensor? ids, Tensor weight, Tensor bias, SymInt[] grid) -> Tensor",
    allocate,
    save=_save,
    backward=_backward,
)
