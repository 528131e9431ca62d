"""GELU of bfloat16 in C++, and its gradient: from a table of all numbers, or computed where CPUs are slow to look up."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate, allocate_backward

_gelu = native_library.function("gelu")
_gelu_backward = native_library.function("gelu_backward")


def bias_gelu(x: Tensor, bias: None) -> Tensor:
    out = allocate(x, bias)
    _gelu(x.contiguous(), out, x.numel(), torch.get_num_threads())
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: None) -> tuple[Tensor, Tensor]:
    for_x, for_bias = allocate_backward(grad, x, bias)
    _gelu_backward(grad.contiguous(), x.contiguous(), for_x, None, x.numel(), torch.get_num_threads())
    return for_x, for_bias
