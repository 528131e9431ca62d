"""Attention in C++ on the matrix tiles (AMX) of a CPU, for bfloat16.

One head at a time, whose scores stay in the cache: nothing of size (N, N) is kept for the backward pass, and queries, keys
and values are read where the projection put them. More exact than torch's bfloat16 products: scores and weights are
float32 until a product needs them rounded.
"""

import torch
from torch import Tensor

from .. import native_library
from . import allocate, allocate_backward

_forward = native_library.function("qkv_attention")
_backward = native_library.function("qkv_attention_backward")
# Raises ImportError where the CPU or the system has no tiles: then there is no native implementation.
_forward(None, 1.0, 0, 1, 1, 1, None, None, 1)


def qkv_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    out, sums = allocate(qkv)
    batch, length, heads, width = out.shape
    _forward(qkv.contiguous(), width**-0.5, batch, length, heads, width, out, sums, torch.get_num_threads())
    return out, sums


def qkv_attention_backward(grad: Tensor, qkv: Tensor, sums: Tensor) -> Tensor:
    for_qkv = allocate_backward(grad, qkv, sums)
    sizes, threads = grad.shape, torch.get_num_threads()
    _backward(grad.contiguous(), qkv.contiguous(), sums, sizes[3] ** -0.5, *sizes, for_qkv, threads)
    return for_qkv
