"""Attention in plain torch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over (B, heads, N, d); bias broadcasts against (B, heads, N, N).

    On CPUs, training in bf16 writes the product out: torch's flash kernel for CPUs is 2-6x slower there in the
    backward pass at these lengths (16 x 12 heads, N=50, d=64: 35 ms against 5.6 ms, forward and backward).
    """
    low_precision = q.dtype != torch.float32 or autocast.dtype(q.device) is not None
    if q.device.type == "cpu" and low_precision and torch.is_grad_enabled():
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))


def qkv_attention(qkv: Tensor) -> Tensor:
    """See the public function."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attention(q, k, v).transpose(1, 2).contiguous()
