"""The seam between two branches of a pre-norm transformer: add a branch to the residual stream, normalize the sum."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_positive, fail

__all__ = ["add_layer_norm"]


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
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise fail("x", "floats (B, ..., D)", got, "convert or reshape it", TypeError)
    width = x.shape[-1]
    _check("residual", residual, tuple(x.shape), x)
    _check("weight", weight, (width,), x)
    _check("bias", bias, (width,), x)
    _check("scale", scale, (width,), x)
    _check("row_scale", row_scale, (x.shape[0],), x)
    if weight is None or width == 0:
        raise fail(
            "weight", "a (D,) tensor, D at least 1", f"weight {weight}, D = {width}", "give one factor per channel"
        )
    if row_scale is not None and row_scale.requires_grad and torch.is_grad_enabled():
        raise fail("row_scale", "a constant", "a tensor that requires a gradient", "detach it")
    check_positive("eps", eps)
    return dispatch.implementation("layer_norm", x.device.type).add_layer_norm(
        x, residual, weight, bias, scale=scale, row_scale=row_scale, eps=eps, prenorm=prenorm
    )


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise fail(name, "a float tensor or None", got, "convert it", TypeError)
    if tuple(tensor.shape) != shape or tensor.device != x.device:
        got = f"{tuple(tensor.shape)} on {tensor.device}"
        raise fail(name, f"shape {shape} on {x.device}", got, "fit it to x")
