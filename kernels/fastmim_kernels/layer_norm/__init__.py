"""The seam between two branches of a pre-norm transformer: add a branch to the residual stream, normalize the sum."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_flag, check_number, check_tensor, describe, fail, is_float
from ..registration import define

__all__ = ["add_layer_norm"]

# A GPU's program holds a whole row; wider ones are left to the reference there.
MAX_WIDTH = {"cuda": 16384}


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of the residual stream after ``x``, the result of a branch, is added to it.

    In plain torch: ``h = residual + x * scale * row_scale[:, None, None]``; ``F.layer_norm(h, (D,), weight, bias, eps)``.
    Computed in float32 or wider. h is rounded to the dtype of ``residual`` before it is normalized, so that the result
    is that of the stream which is passed on.

    Args:
        x: (B, ..., D) floats. residual: like x, of any floating dtype, or None: x alone is normalized.
        weight: (D,). bias: (D,) or None.
        scale: (D,) layer scale of the branch, or None. row_scale: (B,) factor of the branch per image, 0 where
            stochastic depth leaves it out, or None; a constant.
        eps: added to the (biased) variance. prenorm: return h, too.

    Returns: like x; with prenorm a pair of it and h, like residual (like x without one). Differentiable with respect to
        x, residual, weight, bias and scale.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Source: Ba et al., arXiv 1607.06450; layer scale: Touvron et al., arXiv 2103.17239, eq. 4; stochastic depth: Huang
        et al., arXiv 1603.09382. eps as facebookresearch/mae models_mae.py.
    """
    check_tensor("x", x, "floats (B, ..., D)")
    if not is_float(x) or x.ndim < 2:
        raise fail("x", "floats (B, ..., D)", describe(x), "convert or reshape it", TypeError)
    width = x.shape[-1]
    _check("residual", residual, tuple(x.shape), x)
    _check("weight", weight, (width,), x)
    _check("bias", bias, (width,), x)
    _check("scale", scale, (width,), x)
    _check("row_scale", row_scale, (x.shape[0],), x)
    if weight is None or width == 0:
        raise fail("weight", "a (D,) tensor, D at least 1", describe(weight), "give one factor per channel")
    if row_scale is not None and row_scale.requires_grad and torch.is_grad_enabled():
        raise fail("row_scale", "a constant", "a tensor that requires a gradient", "detach it")
    check_flag("prenorm", prenorm)
    check_number("eps", eps)
    if not 0 <= eps < float("inf"):
        raise fail("eps", "a finite number, 0 or more", eps, "correct eps")
    tensors = [t for t in (x, residual, weight, bias, scale, row_scale) if t is not None]
    is_too_wide = width > MAX_WIDTH.get(x.device.type, width)
    if is_too_wide or dispatch.uses_reference("layer_norm", x.device, *tensors):
        return dispatch.reference("layer_norm").add_layer_norm(
            x, residual, weight, bias, scale=scale, row_scale=row_scale, eps=eps, prenorm=prenorm
        )
    is_plain = residual is None and scale is None and row_scale is None
    # The stream is written only if somebody reads it, the caller or the backward pass; x is the stream where nothing is
    # done to it.
    is_read = prenorm or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    y, h, _ = ADD_LAYER_NORM(x, residual, weight, bias, scale, row_scale, eps, is_read and not is_plain)
    if not prenorm:
        return y
    return y, x if is_plain else h


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    check_tensor(name, tensor, "a float tensor or None")
    if not is_float(tensor):
        raise fail(name, "a float tensor or None", tensor.dtype, "convert it", TypeError)
    if tuple(tensor.shape) != shape or tensor.device != x.device:
        got = f"{tuple(tensor.shape)} on {tensor.device}"
        raise fail(name, f"shape {shape} on {x.device}", got, "fit it to x")


def allocate(x, residual, weight, bias, scale, row_scale, eps, is_kept) -> tuple[Tensor, Tensor, Tensor]:
    """Result, stream (empty if it is not kept), and mean and 1 / standard deviation of each row."""
    h = x.new_empty(x.shape if is_kept else (0,), dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), h, x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


def allocate_backward(grad, grad_h, h, stats, x, weight, scale, row_scale, wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch and stream, empty where they are not wanted, and of weight, bias and scale in one."""
    for_x, for_residual = (t.new_empty(h.shape if w else (0,)) for t, w in zip((grad, h), wanted, strict=True))
    return for_x, for_residual, h.new_empty((3, h.shape[-1]), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, scale, row_scale, _, _ = inputs
    _, h, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.is_plain = residual is None and scale is None and row_scale is None
    ctx.save_for_backward(x if ctx.is_plain else h, stats, None if scale is None else x, weight, scale, row_scale)
    ctx.dtypes = [x.dtype, h.dtype]
    ctx.parameters = [None if p is None else p.dtype for p in (weight, bias, scale)]


def _backward(ctx, grad, grad_h, _):
    h, stats, x, weight, scale, row_scale = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(h, dtype=ctx.dtypes[0])
    wanted = list(ctx.needs_input_grad[:2])
    # An unscaled branch of the stream's dtype has the stream's gradient: written once, given to both.
    is_shared = all(wanted) and scale is None and row_scale is None and ctx.dtypes[0] == ctx.dtypes[1]
    wanted[0] &= not is_shared
    for_x, for_residual, sums = ADD_LAYER_NORM_BACKWARD(
        grad, None if ctx.is_plain else grad_h, h, stats, x, weight, scale, row_scale, wanted
    )
    parameters = [
        total.to(dtype) if dtype is not None and need else None
        for total, dtype, need in zip(sums.unbind(), ctx.parameters, ctx.needs_input_grad[2:5], strict=True)
    ]
    for_residual = for_residual if wanted[1] else None
    for_x = for_residual if is_shared else for_x if wanted[0] else None
    return for_x, for_residual, *parameters, None, None, None


ADD_LAYER_NORM_BACKWARD = define(
    "layer_norm",
    "add_layer_norm_backward(Tensor grad, Tensor? grad_h, Tensor h, Tensor stats, Tensor? x, Tensor weight,"
    " Tensor? scale, Tensor? row_scale, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    allocate_backward,
)
ADD_LAYER_NORM = define(
    "layer_norm",
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? scale, Tensor? row_scale,"
    " float eps, bool is_kept) -> (Tensor, Tensor, Tensor)",
    allocate,
    save=_save,
    backward=_backward,
)
