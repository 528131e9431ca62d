"""Reconstruction loss on the pixels of masked patches, targets read straight from the uint8 master images."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_choice,
    check_flag,
    check_ids,
    check_images,
    check_number,
    check_patches,
    check_rank,
    fail,
    is_float,
)
from ..registration import define

__all__ = ["masked_pixel_loss"]

KINDS = ("mse", "l1", "smooth_l1")


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
    """Mean over V values and then over all B * M masked patches of the distance between ``pred`` and the pixels.

    target = ``patchify_gather(images, ids_masked, patch_size, ...)`` in float32, a constant. With ``norm`` each patch
    becomes ``(target - target.mean()) / sqrt(target.var(unbiased) + eps)``, statistics over its V values jointly.

    Args:
        pred: (B, M, V), any floating dtype; row m predicts patch ids_masked[:, m], values ordered as in
            ``patchify_gather``.
        images, mean, std, size, offset, flip, patch_size: as ``patchify_gather``.
        ids_masked: (B, M) int64.
        norm: normalize each target patch. eps: added to its variance, which is in normalized-pixel units.
        kind: "mse" (d**2), "l1" (|d|) or "smooth_l1" (d**2 / 2 below 1, else |d| - 1/2).

    Returns: scalar float32 (float64 for float64 pred). Differentiable with respect to pred.
    Raises: ValueError where there is no masked patch (B or M is 0), kind is unknown or shapes do not fit; TypeError for
        dtypes; IndexError for ids out of range (on the CPU).
    Source: He et al., arXiv 2111.06377, section 3; facebookresearch/mae models_mae.py ``forward_loss``.
    """
    h, w = check_images(images, size, offset, flip, mean, std)
    count = check_patches(h, w, patch_size)
    check_ids("ids_masked", ids_masked, images.shape[0], count, images.device)
    check_rank("pred", pred, "(B, M, V)")
    expected = (*ids_masked.shape, patch_size * patch_size * images.shape[1])
    if tuple(pred.shape) != expected:
        raise fail(
            "pred", f"shape {expected}, one row per masked patch", tuple(pred.shape), "predict the masked patches only"
        )
    if pred.device != images.device or not is_float(pred):
        raise fail(
            "pred", f"floats on {images.device} like images", f"{pred.dtype} on {pred.device}", "move or convert it"
        )
    if ids_masked.numel() == 0:
        raise fail(
            "ids_masked",
            "at least one masked patch",
            f"shape {tuple(ids_masked.shape)}",
            "lower the number of kept patches",
        )
    check_flag("norm", norm)
    if norm and expected[2] < 2:
        raise fail(
            "norm", "patches of at least 2 values", f"V = {expected[2]}", "pass norm=False: one value has no variance"
        )
    check_number("eps", eps)
    check_choice("kind", kind, KINDS)
    if dispatch.uses_reference("pixel_loss", pred.device, pred, images):
        return dispatch.reference("pixel_loss").masked_pixel_loss(
            pred, images, ids_masked, patch_size, mean=mean, std=std, size=(h, w), offset=offset, flip=flip, norm=norm,
            eps=eps, kind=kind,
        )  # fmt: skip
    # On a CPU the gradient for a weight of 1 comes with the loss; for any other weight it is computed anew in the
    # backward pass. A compiled graph and a GPU do not look at weights, so they always do that.
    is_gradient_wanted = (
        pred.device.type == "cpu"
        and pred.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    loss, _ = PIXEL_LOSS(
        is_gradient_wanted, pred, images.detach(), ids_masked, patch_size, mean, std, (h, w), offset, flip, norm, eps,
        kind,
    )  # fmt: skip
    return loss


def allocate(is_gradient_wanted: bool, pred: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient or nothing."""
    return pred.new_empty((), dtype=torch.float32), pred.new_empty(pred.shape if is_gradient_wanted else (0,))


def allocate_backward(grad: Tensor, pred: Tensor, *_: object) -> Tensor:
    return pred.new_empty(pred.shape)


def _save(ctx, inputs, output) -> None:
    ctx.has_gradient, pred, images, ids, patch_size, mean, std, size, offset, flip, *rest = inputs
    gradient = output[1]
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, images, ids, offset, flip, gradient)
    ctx.rest = (patch_size, mean, std, size, rest)


def _backward(ctx, grad, _):
    pred, images, ids, offset, flip, gradient = ctx.saved_tensors
    patch_size, mean, std, size, rest = ctx.rest
    # Given away once only: whoever gets it may add to it in place. With create_graph the op below has to see pred, and a
    # traced weight (no plain Tensor) has no value.
    has_gradient, ctx.has_gradient = ctx.has_gradient, False
    if not has_gradient or torch.is_grad_enabled() or type(grad) is not Tensor or grad.item() != 1:
        gradient = PIXEL_LOSS_BACKWARD(grad, pred, images, ids, patch_size, mean, std, size, offset, flip, *rest)
    return None, gradient, *[None] * 11


ARGUMENTS = (
    "Tensor pred, Tensor images, Tensor ids_masked, int patch_size, float[]? mean, float[]? std, SymInt[] size,"
    " Tensor? offset, Tensor? flip, bool norm, float eps, str kind"
)
PIXEL_LOSS_BACKWARD = define(
    "pixel_loss", f"masked_pixel_loss_backward(Tensor grad, {ARGUMENTS}) -> Tensor", allocate_backward
)
PIXEL_LOSS = define(
    "pixel_loss",
    f"masked_pixel_loss(bool is_gradient_wanted, {ARGUMENTS}) -> (Tensor, Tensor)",
    allocate,
    save=_save,
    backward=_backward,
)
