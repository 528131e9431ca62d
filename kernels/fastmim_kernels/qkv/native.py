"""Attention in C++ by a CPU's products of bfloat16: matrix tiles (AMX) or vectors (AVX512_BF16).

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
# Raises ImportError where the CPU or the system has none: then there is no native implementation.
_forward(None, None, 1.0, 0, 1, 1, 1, None, None, 1)


def qkv_attention(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, sums = allocate(qkv, bias)
    bias = None if bias is None else bias.contiguous()
    _forward(qkv.contiguous(), bias, out.shape[3] ** -0.5, *out.shape, out, sums, torch.get_num_threads())
    return out, sums


def qkv_attention_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, sums: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    for_qkv, for_bias = allocate_backward(grad, qkv, bias, sums, wants_bias)
    bias = None if bias is None else bias.contiguous()
    _backward(
        grad.contiguous(), qkv.contiguous(), bias, sums, grad.shape[3] ** -0.5, *grad.shape, for_qkv,
        for_bias if wants_bias else None, torch.get_num_threads(),
    )  # fmt: skip
    return for_qkv, for_bias
