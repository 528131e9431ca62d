"""Attention in plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    In plain torch: ``F.scaled_dot_product_attention(q, k, v, bias)``, which is what runs, except where a gradient is wanted
    on a CPU in another dtype than float32 or under autocast. There the products are written out, since torch's flash kernel
    is slow in the backward pass at these lengths: forward and backward of 16 x 12 heads, N = 50, d = 64 in bfloat16 take
    35 ms, written out 5.6 (one core with AVX-512 and AMX, torch 2.13).

    Args:
        q, k, v: (B, H, N, d) floats of one dtype.
        bias: broadcasts against (B, H, N, N); None: none.

    Returns: (B, H, N, d).
    Source: arXiv 1706.03762 section 3.2.1.
    """
    low_precision = q.dtype != torch.float32 or autocast.dtype(q.device) is not None
    if q.device.type == "cpu" and low_precision and torch.is_grad_enabled():
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))


def qkv_attention(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the public function."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attention(q, k, v, bias).transpose(1, 2).contiguous()
