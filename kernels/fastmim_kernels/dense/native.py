"""Weight and bias gradient of a linear layer in C++ by a CPU's products of bfloat16: matrix tiles (AMX) or vectors
(AVX512_BF16).

The other two products are torch's, which reach 1.2 to 1.8 TFLOP/s on the tiles of one core; its product for the weight, whose
factors both lie against the grain, reaches half of that (6304 x 512 x 2048: 21 ms against 10 ms), gives bfloat16, and
leaves the bias to a pass of its own.
"""

import torch
from torch import Tensor

from .. import native_library
from . import allocate_backward

_gradients = native_library.function("linear_gradients")
_gelu_backward = native_library.function("gelu_backward")
# Raises ImportError where the CPU or the system has none: then there is no native implementation.
_gradients(None, None, 0, 0, 0, None, None, 1)


def linear_backward(grad: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    for_weight, for_bias = allocate_backward(grad, x, has_bias)
    outputs, inputs = for_weight.shape
    rows, threads = grad.numel() // max(1, outputs), torch.get_num_threads()
    grad, x = grad.contiguous(), x.contiguous()
    _gradients(grad, x, rows, outputs, inputs, for_weight, for_bias if has_bias else None, threads)
    return for_weight, for_bias


def gelu_linear_backward(grad: Tensor, x: Tensor, low: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    for_x, active = torch.empty_like(x), torch.empty_like(x)
    # Of GELU's result first, and then, in its place, of x.
    torch.mm(grad.view(-1, low.shape[0]), low, out=for_x.view(-1, low.shape[1]))
    _gelu_backward(for_x, x, for_x, active, x.numel(), torch.get_num_threads())
    return for_x, *linear_backward(grad, active, has_bias)
