"""Linear layers whose weight gradient is summed in float32, also behind a GELU."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast, dispatch, native_library
from ..activation import BIAS_GELU, bias_gelu
from ..checks import check_rank, check_tensor, describe, fail, is_float
from ..registration import define, refuse_second_derivative

__all__ = ["gelu_linear", "linear"]

# By vectors our products are faster than torch's, on matrix tiles those of torch are.
HAS_OWN_PRODUCTS = not native_library.has_tiles()
# What torch.compile makes of linear layers on CPUs; not in every build of torch.
HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``; autocast applies to it.

    Args:
        x: (..., I) floats. weight: (O, I). bias: (O,) or None.

    Returns: (..., O), in the dtype that ``F.linear`` gives. Differentiable.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    _check(x, weight, bias)
    if not _is_native(x, weight):
        return dispatch.reference("dense").linear(x, weight, bias)
    x, low = x.to(torch.bfloat16), _low(weight)
    return Product.apply(x, weight, bias, low) if torch.is_grad_enabled() else _forward(x, low, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(F.gelu(x), weight, bias)``: the second half of an MLP.

    For bfloat16 on a CPU that multiplies it (AMX or AVX512_BF16), GELU is computed again in the backward pass, in the pass
    over x that its gradient takes anyway, so that x alone is kept.

    Args:
        x: (..., I) floats. weight: (O, I). bias: (O,) or None.

    Returns: (..., O), in the dtype that ``linear`` gives. Differentiable.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Source: Hendrycks, Gimpel, arXiv 1606.08415.
    """
    _check(x, weight, bias)
    is_fit = x.dtype == torch.bfloat16 and not dispatch.uses_reference("activation", x.device, x)
    if not (is_fit and _is_native(x, weight)):
        return linear(bias_gelu(x), weight, bias)
    low = _low(weight)
    return (
        GeluProduct.apply(x, weight, bias, low) if torch.is_grad_enabled() else _forward(BIAS_GELU(x, None), low, bias)
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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


def _is_native(x: Tensor, weight: Tensor) -> bool:
    if dispatch.uses_reference("dense", x.device, x, weight):
        return False
    # A gradient for x alone is torch's own affair.
    is_wanted = weight.requires_grad or not torch.is_grad_enabled()
    return product_dtype(x) == torch.bfloat16 and is_wanted and weight.numel() > 0


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


def _low(weight: Tensor) -> Tensor:
    copy = None if torch.compiler.is_compiling() else _rounded.get(weight)
    return weight.detach().bfloat16() if copy is None else copy


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of bfloat16 on a CPU. torch's own first fills the result with the bias, and then adds the product to
    it: up to a sixth more time (3152 x 512 -> 2048: 6.6 against 5.6 ms on a core). oneDNN, and ours, add it as they write."""
    if HAS_OWN_PRODUCTS:
        return PRODUCT(x, weight, bias, True)
    if bias is None:
        return F.linear(x, weight)
    if HAS_ONEDNN_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.to(x.dtype).contiguous(), "none", [], "")
    return F.linear(x, weight, bias.to(x.dtype))


def product_with(grad: Tensor, weight: Tensor) -> Tensor:
    """(..., O) and (O, I) -> (..., I), bfloat16 on a CPU: the gradient of the input."""
    return PRODUCT(grad, weight, None, False) if HAS_OWN_PRODUCTS else grad @ weight


def allocate_product(x: Tensor, weight: Tensor, bias: Tensor | None, is_transpose: bool) -> Tensor:
    """(..., columns) of the factor (depth, columns), or of its transpose."""
    return x.new_empty((*x.shape[:-1], weight.shape[0 if is_transpose else 1]))


def allocate_backward(grad: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients (O, I) of the weight and (O,), or empty, of the bias, float32."""
    outputs, inputs = grad.shape[-1], x.shape[-1]
    sizes = (outputs, inputs), (outputs if has_bias else 0,)
    for_weight, for_bias = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return for_weight, for_bias


def allocate_gelu_backward(grad: Tensor, x: Tensor, low: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and before them that of x."""
    return x.new_empty(x.shape), *allocate_backward(grad, x, has_bias)


PRODUCT = define(
    "dense", "linear_product(Tensor x, Tensor weight, Tensor? bias, bool is_transpose) -> Tensor", allocate_product
)
BACKWARD = define(
    "dense", "linear_backward(Tensor grad, Tensor x, bool has_bias) -> (Tensor, Tensor)", allocate_backward
)
GELU_BACKWARD = define(
    "dense",
    "gelu_linear_backward(Tensor grad, Tensor x, Tensor low, bool has_bias) -> (Tensor, Tensor, Tensor)",
    allocate_gelu_backward,
)


class Product(torch.autograd.Function):
    """The forward product, and gradients.

    `low` is the weight in the dtype of the product. It is kept for the backward pass, in which the parameter itself need
    not be there (ZeRO-3). No `setup_context`: torch then reads the signature anew in each call, 30 us. Transforms, which
    ask for it, get the reference.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        _keep(ctx, x, weight, bias, low)
        return _forward(x, low, bias)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("linear")
        x, low = ctx.saved_tensors
        for_x = product_with(grad, low) if ctx.needs_input_grad[0] else None
        return for_x, *_as_parameters(ctx, *BACKWARD(grad, x, ctx.needs_input_grad[2])), None


class GeluProduct(Product):
    """The same of GELU of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> Tensor:
        _keep(ctx, x, weight, bias, low)
        return _forward(BIAS_GELU(x, None), low, bias)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            refuse_second_derivative("gelu_linear")
        for_x, *others = GELU_BACKWARD(grad, *ctx.saved_tensors, ctx.needs_input_grad[2])
        return for_x, *_as_parameters(ctx, *others), None


def _keep(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor) -> None:
    ctx.save_for_backward(x, low)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _as_parameters(ctx, for_weight: Tensor, for_bias: Tensor) -> tuple[Tensor, Tensor | None]:
    weight_dtype, bias_dtype = ctx.dtypes
    return for_weight.to(weight_dtype), for_bias.to(bias_dtype) if ctx.needs_input_grad[2] else None
