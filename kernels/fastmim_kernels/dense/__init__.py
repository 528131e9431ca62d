"""A linear layer whose weight gradient is summed in float32."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast, dispatch
from ..checks import check_rank, check_tensor, describe, fail, is_float
from ..registration import define, refuse_second_derivative

__all__ = ["linear"]

# What torch.compile makes of linear layers on CPUs; not in every build of torch.
HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; autocast applies to it.

    Args:
        x: (..., I) floats. weight: (O, I). bias: (O,) or None.

    Returns: (..., O), in the dtype that ``F.linear`` gives. Differentiable.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    check_tensor("x", x, "floats (..., I)")
    if not is_float(x) or x.ndim < 1:
        raise fail("x", "floats (..., I)", describe(x), "convert or reshape it", TypeError)
    check_rank("weight", weight, "(O, I)")
    if weight.shape[1] != x.shape[-1]:
        raise fail("weight", f"shape (O, {x.shape[-1]})", tuple(weight.shape), "fit it to the last dimension of x")
    if bias is not None:
        check_rank("bias", bias, "(O,)")
        if bias.shape != weight.shape[:1]:
            raise fail("bias", f"shape ({weight.shape[0]},) or None", tuple(bias.shape), "one value per row of weight")
    # Autocast converts all but float64.
    is_cast = autocast.dtype(x.device) is not None and x.dtype != torch.float64
    for name, tensor in (("weight", weight), ("bias", weight if bias is None else bias)):
        is_alike = is_float(tensor) and tensor.dtype != torch.float64 if is_cast else tensor.dtype == x.dtype
        if not is_alike or tensor.device != x.device:
            got = f"{tensor.dtype} on {tensor.device}"
            raise fail(name, f"{x.dtype} on {x.device} like x", got, "convert it, or use autocast", TypeError)
    dtype, has_grad = product_dtype(x), torch.is_grad_enabled()
    # A gradient for x alone is torch's own affair.
    is_fit = dtype == torch.bfloat16 and (weight.requires_grad or not has_grad) and weight.numel()
    if dispatch.uses_reference("dense", x.device, x, weight) or not is_fit:
        return dispatch.reference("dense").linear(x, weight, bias)
    x, low = x.to(dtype), _low(weight, dtype)
    return Product.apply(x, weight, bias, low) if has_grad else _forward(x, low, bias)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of x is computed: autocast's, or its own."""
    return autocast.dtype(x.device) or x.dtype


@contextlib.contextmanager
def rounded_weights(copies: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within it, `linear` takes ``copies[weight]`` for ``weight.bfloat16()``, if it is there, and need not compute it.

    The caller sees to it that they are equal.
    """
    global _rounded
    before, _rounded = _rounded, copies
    try:
        yield
    finally:
        _rounded = before


_rounded: Mapping[Tensor, Tensor] = {}


def _low(weight: Tensor, dtype: torch.dtype) -> Tensor:
    copy = None if torch.compiler.is_compiling() else _rounded.get(weight)
    return weight.detach().to(dtype) if copy is None else copy


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of bfloat16 on a CPU. torch's own first fills the result with the bias, and then adds the product to
    it: up to a sixth more time (3152 x 512 -> 2048: 6.6 against 5.6 ms on a core). oneDNN adds it as it writes."""
    if bias is None:
        return F.linear(x, weight)
    if HAS_ONEDNN_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype), "none", [], "")
    return F.linear(x, weight, bias.to(x.dtype))


def allocate_backward(grad: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients (O, I) of the weight and (O,), or empty, of the bias, float32."""
    outputs, inputs = grad.shape[-1], x.shape[-1]
    sizes = (outputs, inputs), (outputs if has_bias else 0,)
    for_weight, for_bias = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return for_weight, for_bias


BACKWARD = define(
    "dense", "linear_backward(Tensor grad, Tensor x, bool has_bias) -> (Tensor, Tensor)", allocate_backward
)


class Product(torch.autograd.Function):
    """torch's forward product and gradient of x, our gradients of weight and bias.

    `low` is the weight in the dtype of the product. It is kept for the backward pass, in which the parameter itself need
    not be there (ZeRO-3).
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        return _forward(x, low, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, low = inputs
        ctx.save_for_backward(x, low)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("linear")
        x, low = ctx.saved_tensors
        for_x = grad @ low if ctx.needs_input_grad[0] else None
        has_bias = ctx.needs_input_grad[2]
        for_weight, for_bias = BACKWARD(grad, x, has_bias)
        weight_dtype, bias_dtype = ctx.dtypes
        return for_x, for_weight.to(weight_dtype), for_bias.to(bias_dtype) if has_bias else None, None
