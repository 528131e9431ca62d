"""Residual addition and LayerNorm by torch's own ops."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast


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
    stream: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the public function. stream: what the sum is rounded to; None: the dtype of the residual, or of x."""
    given = x.dtype if residual is None else residual.dtype
    work = torch.promote_types(torch.promote_types(x.dtype, given), torch.float32)
    stream = stream or given
    with autocast.disabled(x.device):
        h = x.to(work)
        if scale is not None:
            h = h * scale.to(work)
        if row_scale is not None:
            h = h * row_scale.to(work).view(-1, *[1] * (x.ndim - 1))
        if residual is not None:
            h = residual.to(work) + h
        if stream != work:
            h = _Rounded.apply(h, stream)
        parameters = (weight.to(work), None if bias is None else bias.to(work))
        y = F.layer_norm(h, (x.shape[-1],), *parameters, eps).to(x.dtype)
    return (y, h.to(stream)) if prenorm else y


class _Rounded(torch.autograd.Function):
    """The values that ``dtype`` has for those of x, in the dtype of x.

    Its gradient is passed on as it is. That of ``x.to(dtype)`` would be rounded as well, and the gradient of ``scale`` adds
    up such errors over all rows: 0.24 in single values over 1,576 rows in bfloat16, 0.016 so.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
