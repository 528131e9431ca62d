"""The products of a linear layer in C++ by a CPU's products of bfloat16: matrix tiles (AMX) or vectors (AVX512_BF16).

On tiles only the gradients of weight and bias: torch's other two products reach 1.2 to 1.8 TFLOP/s there on one core; its
product for the weight, whose factors both lie against the grain, reaches half of that (6304 x 512 x 2048: 21 ms against 10 ms),
gives bfloat16, and leaves the bias to a pass of its own. By vectors all three: of the 0.47 TFLOP/s that one core's registers
reach, torch has 0.40 to 0.42, and these 0.42 to 0.46.
"""

import torch
from torch import Tensor

from .. import native_library
from . import allocate_backward, allocate_product, product_with

_product = native_library.function("linear_product")
_gradients = native_library.function("linear_gradients")
_gelu_backward = native_library.function("gelu_backward")
# Raises ImportError where the CPU or the system has none: then there is no native implementation.
_gradients(None, None, 0, 0, 0, None, None, 1)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None, is_transpose: bool) -> Tensor:
    out = allocate_product(x, weight, bias, is_transpose)
    depth, columns = x.shape[-1], out.shape[-1]
    if x.numel() == 0 or columns == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    _product(x, weight, is_transpose, bias, x.numel() // depth, depth, columns, out, torch.get_num_threads())
    return out


def linear_backward(grad: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    for_weight, for_bias = allocate_backward(grad, x, has_bias)
    outputs, inputs = for_weight.shape
    rows, threads = grad.numel() // max(1, outputs), torch.get_num_threads()
    grad, x = grad.contiguous(), x.contiguous()
    _gradients(grad, x, rows, outputs, inputs, for_weight, for_bias if has_bias else None, threads)
    return for_weight, for_bias


def gelu_linear_backward(grad: Tensor, x: Tensor, low: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    active = torch.empty_like(x)
    # Of GELU's result first, and then, in its place, of x.
    for_x = product_with(grad, low)
    _gelu_backward(for_x, x, for_x, active, x.numel(), torch.get_num_threads())
    return for_x, *linear_backward(grad, active, has_bias)
