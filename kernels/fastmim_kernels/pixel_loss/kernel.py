"""Pixel loss in Triton: pixels become targets in registers and meet the prediction there; no target is ever stored.

One pass gives the loss of each patch; the gradient is one more pass, which makes the targets anew from the pixels. That
moves fewer bytes than storing the gradient in the forward pass and scaling it afterwards (8 instead of 9 units of the
uint8 pixels, for bfloat16 predictions), rounds once, and cannot underflow in float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from ..patches.kernel import (
    channel_constants,
    contiguous,
    normalized,
    patch_offsets,
    patch_origin,
    pixel_constants,
    window_of,
)
from . import allocate, allocate_backward


@triton.jit
def pixel_loss_kernel(
    pred_ptr, images_ptr, ids_ptr, offset_ptr, flip_ptr, loss_ptr, upstream_ptr, grad_ptr,
    masked, columns, width, eps, stride_pred_b, stride_pred_m, stride_pred_v, stride_b, stride_c, stride_h, stride_w,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
    NORM: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (image, PATCHES of its masked patches). Writes each patch's summed loss, or the gradient of pred.

    upstream_ptr -> gradient of the mean loss divided by the number of values; None where the loss is wanted.
    """
    V: tl.constexpr = P * P * C
    tiles = tl.cdiv(masked, PATCHES)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * PATCHES
    top, left, is_flipped = window_of(offset_ptr, flip_ptr, image)
    channel, offsets = patch_offsets(is_flipped, stride_c, stride_h, stride_w, P, C, BLOCK, WIDE)
    shift, scale = channel_constants(channel, SHIFT, SCALE, C)
    place = first + tl.arange(0, PATCHES)
    exists = place < masked
    patch = tl.load(ids_ptr + image * masked + place, mask=exists, other=0)
    origin = patch_origin(top, left, is_flipped, patch, columns, width, stride_h, stride_w, P)
    # Consecutive threads take consecutive values, as in patchify_kernel.
    index = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    is_value = (index < V)[None, :]
    inside = exists[:, None] & is_value
    pixels = images_ptr + image * stride_b + origin[:, None]
    pixels = tl.load(pixels + offsets[None, :], mask=inside, other=0)
    pred = pred_ptr + image * stride_pred_b + place.to(tl.int64)[:, None] * stride_pred_m
    pred = tl.load(pred + index.to(tl.int64)[None, :] * stride_pred_v, mask=inside, other=0)

    shift, scale = channel_constants(channel, SHIFT, SCALE, C)
    target = normalized(pixels, shift[None, :], scale[None, :], LEVELS, NORMALIZE)
    if NORM:
        target -= (tl.sum(tl.where(is_value, target, 0.0), 1) / V)[:, None]
        variance = tl.sum(tl.where(is_value, target * target, 0.0), 1) / (V - 1)
        target *= (1 / tl.sqrt_rn(variance + eps))[:, None]
    difference = pred.to(tl.float32) - target
    if upstream_ptr is None:
        if KIND == "mse":
            loss = difference * difference
        elif KIND == "l1":
            loss = tl.abs(difference)
        else:
            size = tl.abs(difference)
            loss = tl.where(size < 1, 0.5 * difference * difference, size - 0.5)
        loss = tl.sum(tl.where(is_value, loss, 0.0), 1)
        tl.store(loss_ptr + image * masked + place, loss, mask=exists)
    else:
        if KIND == "mse":
            slope = 2 * difference
        elif KIND == "l1":
            slope = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
        else:
            slope = tl.minimum(tl.maximum(difference, -1.0), 1.0)
        slope *= tl.load(upstream_ptr)
        grad = grad_ptr + (image * masked + place)[:, None] * V + index[None, :]
        tl.store(grad, slope.to(grad_ptr.dtype.element_ty), mask=inside)


def launch(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: list[float] | None,
    std: list[float] | None,
    size: list[int],
    offset: Tensor | None,
    flip: Tensor | None,
    norm: bool,
    eps: float,
    kind: str,
    loss: Tensor | None,
    upstream: Tensor | None,
    grad: Tensor | None,
) -> None:
    batch, masked, _ = pred.shape
    constants = pixel_constants(images, patch_size, mean, std)
    pixel_loss_kernel[(batch * cdiv(masked, constants["PATCHES"]),)](
        pred, images, ids.contiguous(), contiguous(offset), contiguous(flip), loss, upstream, grad,
        masked, size[1] // patch_size, images.shape[3], eps, *pred.stride(), *images.stride(),
        NORM=norm, KIND=kind, **constants,
    )  # fmt: skip


def masked_pixel_loss(is_gradient_wanted: bool, pred: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    _, gradient = allocate(is_gradient_wanted, pred)
    losses = pred.new_empty(pred.shape[:2], dtype=torch.float32)
    launch(pred, *arguments, losses, None, None)
    if is_gradient_wanted:
        launch(pred, *arguments, None, losses.new_full((), 1 / pred.numel()), gradient)
    return losses.sum() / pred.numel(), gradient


def masked_pixel_loss_backward(grad: Tensor, pred: Tensor, *arguments: object) -> Tensor:
    gradient = allocate_backward(grad, pred)
    launch(pred, *arguments, None, grad.float() / pred.numel(), gradient)
    return gradient
