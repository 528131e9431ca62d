"""Pixel loss in C++: loss and gradient in one pass; the target of a patch exists only in the cache."""

import torch
from torch import Tensor

from .. import native_library
from ..patches.native import contiguous, images_shape, levels
from ..registration import define, no_second_derivative
from . import KINDS, reference

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


def _forward(is_gradient_wanted: bool, pred: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    loss, gradient = _fake(is_gradient_wanted, pred)
    losses = pred.new_empty(pred.shape[:2], dtype=torch.float64)
    _run(losses, gradient if is_gradient_wanted else None, 1 / pred.numel(), pred, *arguments)
    return loss.copy_(losses.sum() / pred.numel()), gradient


def _fake(is_gradient_wanted: bool, pred: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return pred.new_empty((), dtype=torch.float32), pred.new_empty(pred.shape if is_gradient_wanted else (0,))


def _backward(grad: Tensor, pred: Tensor, *arguments: object) -> Tensor:
    gradient = pred.new_empty(pred.shape)
    _run(None, gradient, grad.item() / pred.numel(), pred, *arguments)
    return gradient


ARGUMENTS = (
    "Tensor pred, Tensor images, Tensor ids_masked, int patch_size, float[]? mean, float[]? std, SymInt[] size,"
    " Tensor? offset, Tensor? flip, bool norm, float eps, str kind"
)
_gradient = define(
    f"native_masked_pixel_loss_backward(Tensor grad, {ARGUMENTS}) -> Tensor",
    _backward,
    lambda grad, pred, *_: pred.new_empty(pred.shape),
    backward=no_second_derivative("masked_pixel_loss"),
)


def _save(ctx, inputs, output) -> None:
    is_gradient_wanted, pred, images, ids, patch_size, mean, std, size, offset, flip, *rest = inputs
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, images, ids, offset, flip, gradient)
    ctx.rest = (patch_size, mean, std, size, rest)
    ctx.has_gradient = is_gradient_wanted


def _differentiate(ctx, grad, _):
    pred, images, ids, offset, flip, gradient = ctx.saved_tensors
    patch_size, mean, std, size, rest = ctx.rest
    # Given away once only: whoever gets it may add to it in place. With create_graph the op below has to see pred, and a
    # traced weight (no plain Tensor) has no value.
    has_gradient, ctx.has_gradient = ctx.has_gradient, False
    if not has_gradient or torch.is_grad_enabled() or type(grad) is not Tensor or grad.item() != 1:
        gradient = _gradient(grad, pred, images, ids, patch_size, mean, std, size, offset, flip, *rest)
    return None, gradient, *[None] * 11


_loss = define(
    f"native_masked_pixel_loss(bool is_gradient_wanted, {ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    backward=_differentiate,
    save=_save,
)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    ids_masked: Tensor,
    patch_size: int,
    *,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: tuple[int, int] | None = None,
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-6,
    kind: str = "mse",
) -> Tensor:
    """See the public function. float64 is left to the reference."""
    if pred.dtype not in native_library.FLOATS or images.dtype not in native_library.DTYPES:
        return reference.masked_pixel_loss(
            pred, images, ids_masked, patch_size, mean=mean, std=std, size=size, offset=offset, flip=flip, norm=norm,
            eps=eps, kind=kind,
        )  # fmt: skip
    size = images.shape[2:] if size is None else size
    # With the loss comes the gradient for a weight of 1; for any other weight it is computed anew in the backward pass.
    # A compiled graph does not look at weights, so it always does that.
    is_gradient_wanted = pred.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    loss, _ = _loss(
        is_gradient_wanted,
        pred,
        images.detach(),
        ids_masked,
        patch_size,
        mean,
        std,
        size,
        offset,
        flip,
        norm,
        eps,
        kind,
    )
    return loss
