"""The activation of a transformer's MLP, fused with the bias before it.

On a CPU leave the bias to ``F.linear``, which adds it for nothing, as ``functional.linear_gelu`` does: with a bias, x in low
precision is added and activated in float32, for one rounding in place of two, which is slower than ``F.gelu(x + bias)``. On
a GPU the op saves a pass over the activations. The native twin is for bfloat16 without a bias.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_tensor, fail, is_float
from ..registration import define

__all__ = ["bias_gelu"]


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact GELU of x + bias: y * Phi(y), Phi the normal distribution function.

    In plain torch: ``F.gelu(x + bias)``, computed in float32 or wider and rounded once.

    Args:
        x: (..., D) floats. bias: (D,), or None where x has it already.

    Returns: like x. Differentiable with respect to x and bias.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Source: Hendrycks, Gimpel, arXiv 1606.08415.
    """
    for name, tensor in (("x", x), ("bias", x if bias is None else bias)):
        check_tensor(name, tensor)
        if not is_float(tensor):
            raise fail(name, "floats", tensor.dtype, "convert it", TypeError)
    if bias is not None and (tuple(bias.shape) != tuple(x.shape[-1:]) or bias.device != x.device):
        raise fail(
            "bias", f"shape {tuple(x.shape[-1:])} on {x.device}", f"{tuple(bias.shape)} on {bias.device}", "fit it"
        )
    is_native = dispatch.backend_of("activation", x.device.type) == "native"
    is_fit = not is_native or (x.dtype == torch.bfloat16 and bias is None)
    if dispatch.uses_reference("activation", x.device, x, bias) or not is_fit:
        return dispatch.reference("activation").bias_gelu(x, bias)
    return BIAS_GELU(x, bias)


def allocate(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def allocate_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if bias is not None else 0, dtype=torch.float32)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    x_grad, bias_grad = BIAS_GELU_BACKWARD(grad, x, bias)
    return x_grad, None if bias is None else bias_grad.to(bias.dtype)


BIAS_GELU_BACKWARD = define(
    "activation",
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    allocate_backward,
)
BIAS_GELU = define(
    "activation",
    "bias_gelu(Tensor x, Tensor? bias) -> Tensor",
    allocate,
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    backward=_backward,
)
