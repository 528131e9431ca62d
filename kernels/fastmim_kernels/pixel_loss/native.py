"""Pixel loss in C++: loss and gradient in one pass; the target of a patch exists only in the cache."""

import torch
from torch import Tensor

from .. import native_library
from ..patches.native import contiguous, images_shape, levels
from . import KINDS, allocate, allocate_backward

_masked_pixel_loss = native_library.function("masked_pixel_loss")


def _run(
    losses: Tensor | None, gradient: Tensor | None, weight: float, pred: Tensor, images: Tensor, ids: Tensor,
    patch_size: int, mean: list[float] | None, std: list[float] | None, size: list[int], offset: Tensor | None,
    flip: Tensor | None, norm: bool, eps: float, kind: str,
) -> None:  # fmt: skip
    pred, ids, offset, flip = contiguous(pred, ids, offset, flip)
    _masked_pixel_loss(
        images, images_shape(images, size), offset, flip, ids, ids.shape[1], patch_size, *levels(images, mean, std),
        pred, native_library.DTYPES[pred.dtype], norm, eps, KINDS.index(kind), losses, weight, gradient,
        torch.get_num_threads(),
    )  # fmt: skip


def masked_pixel_loss(is_gradient_wanted: bool, pred: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    loss, gradient = allocate(is_gradient_wanted, pred)
    losses = pred.new_empty(pred.shape[:2], dtype=torch.float64)
    _run(losses, gradient if is_gradient_wanted else None, 1 / pred.numel(), pred, *arguments)
    return loss.copy_(losses.sum() / pred.numel()), gradient


def masked_pixel_loss_backward(grad: Tensor, pred: Tensor, *arguments: object) -> Tensor:
    gradient = allocate_backward(grad, pred)
    _run(None, gradient, grad.item() / pred.numel(), pred, *arguments)
    return gradient
