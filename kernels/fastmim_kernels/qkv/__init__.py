"""Self-attention over what one fused projection gives, without permuted copies."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_rank, fail, is_float
from ..registration import define
from .reference import attention

__all__ = ["attention", "qkv_attention"]

# Longer sequences are the reference's: of each thread's (N, N) tables, two have to stay in its cache, or near it.
LONGEST = 1024


def qkv_attention(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of every token to every token of its image.

    softmax(q k^T / sqrt(d) + bias) v for each head. In plain torch: ``q, k, v = qkv.permute(2, 0, 3, 1, 4)``;
    ``F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)``.

    Args:
        qkv: (B, N, 3, H, d) floats: queries, keys and values of H heads, as ``nn.Linear(D, 3 * D)`` gives them.
        bias: (H, N, N) floats, rows are queries: what is added to the scores of every image, as a bias of relative position
            is; None: nothing.

    Returns: (B, N, H, d), contiguous, like qkv. Differentiable; the bias's gradient is summed in float32.
    Raises: ValueError or TypeError for another shape or dtype.
    Source: arXiv 1706.03762 section 3.2.1; the backward pass computes the weights again from the saved logarithm of
        their sum, as arXiv 2205.14135 (FlashAttention) does.
    """
    check_rank("qkv", qkv, "(B, N, 3, H, d)")
    if qkv.shape[2] != 3:
        raise fail("qkv", "(B, N, 3, H, d)", tuple(qkv.shape), "reshape the projection's result to it")
    if not is_float(qkv):
        raise fail("qkv", "floats", qkv.dtype, "convert it", TypeError)
    if not qkv.shape[4]:
        raise fail("qkv", "d of at least 1", tuple(qkv.shape), "give each head a channel")
    if bias is not None:
        _check_bias(bias, qkv)
    is_fit = qkv.dtype == torch.bfloat16 and qkv.shape[1] <= LONGEST
    if dispatch.uses_reference("qkv", qkv.device, qkv, bias) or not is_fit:
        return dispatch.reference("qkv").qkv_attention(qkv, bias)
    return ATTENTION(qkv, None if bias is None else bias.float())[0]


def _check_bias(bias: Tensor, qkv: Tensor) -> None:
    check_rank("bias", bias, "(H, N, N)")
    expected = (qkv.shape[3], qkv.shape[1], qkv.shape[1])
    if tuple(bias.shape) != expected:
        raise fail(
            "bias", f"shape (H, N, N) = {expected}", tuple(bias.shape), "give each head a number per pair of tokens"
        )
    if not is_float(bias):
        raise fail("bias", "floats", bias.dtype, "convert it", TypeError)
    if bias.device != qkv.device:
        raise fail("bias", f"a tensor on {qkv.device} like qkv", bias.device, "move it to the device of qkv")


def allocate(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the logarithms to base 2 of what the softmax divided by, (B, H, N) float32."""
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty((batch, length, heads, width)), qkv.new_empty((batch, heads, length), dtype=torch.float32)


def allocate_backward(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, sums: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and of the bias; the latter empty where nobody wants it."""
    return qkv.new_empty(qkv.shape), sums.new_empty(bias.shape if wants_bias else 0)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, grad, _):
    if grad is None:
        return None, None
    wants_bias = ctx.needs_input_grad[1]
    for_qkv, for_bias = BACKWARD(grad, *ctx.saved_tensors, wants_bias)
    return for_qkv, for_bias if wants_bias else None


BACKWARD = define(
    "qkv",
    "qkv_attention_backward(Tensor grad, Tensor qkv, Tensor? bias, Tensor sums, bool wants_bias) -> (Tensor, Tensor)",
    allocate_backward,
)
ATTENTION = define(
    "qkv", "qkv_attention(Tensor qkv, Tensor? bias) -> (Tensor, Tensor)", allocate, save=_save, backward=_differentiate
)
