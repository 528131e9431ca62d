"""Attention in which each patch keeps only the patches that it rates highest."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_integer, check_like, check_positive, check_rank, fail, is_float
from ..registration import define

__all__ = ["topk_attention"]

# Tokens and width of a head that a GPU's program can hold; longer ones are left to the reference there.
MAX_TOKENS, MAX_WIDTH = 2048, 128


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int,
    *,
    num_prefix: int = 1,
    scale: float | None = None,
    labels: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the ``topk`` best patch keys of each patch query, per head, and all prefix keys.

    In plain torch: ``s = scale * q @ k.T`` in float32; ``least = s[P:, P:].topk(topk, -1).values[..., -1:]``; patch keys
    with ``s < least`` become -inf in the rows of patch queries; ``s.softmax(-1) @ v``. Keys tied with the topk-th stay,
    so that more than ``topk`` may. Prefix queries attend to everything. The choice is a constant of the gradient, which
    flows through the kept scores only. ``topk = L`` is plain attention.

    Args:
        q, k, v: (B, H, N, d) floats of one dtype, N = P + L; any strides. Scores are float32 even under autocast.
        topk: K, 1..L.
        num_prefix: P, 0 or more tokens before the patches.
        scale: of the scores; None: d**-0.5.
        labels: (B, L) int64, the image that each patch comes from, to count how many of the keys were chosen rightly.

    Returns: (B, H, N, d) of the dtype of v; with labels a pair of it and (B, H, L) int64: of the kept patch keys of each
        patch query, itself included, those with its label. Differentiable with respect to q, k and v.
    Raises: ValueError or TypeError for arguments that do not fit each other or counts out of range.
    Source: MixedAE, arXiv 2303.17152 (TopK in the attention); the treatment of prefix tokens is our choice.
    """
    check_rank("q", q, "(B, H, N, d)")
    for name, tensor in (("k", k), ("v", v)):
        check_rank(name, tensor, "(B, H, N, d)")
        if tensor.shape != q.shape or tensor.device != q.device:
            got = f"{tuple(tensor.shape)} on {tensor.device}"
            raise fail(name, f"{tuple(q.shape)} on {q.device} like q", got, "give q, k and v one shape and device")
        if tensor.dtype != q.dtype or not is_float(q):
            raise fail(name, "floats of one dtype for q, k and v", f"{q.dtype}, {tensor.dtype}", "convert", TypeError)
    length = q.shape[2]
    if not q.shape[3]:
        raise fail("q", "d of at least 1", tuple(q.shape), "give each head a channel")
    check_integer("num_prefix", num_prefix)
    check_integer("topk", topk)
    if not 0 <= num_prefix < length:
        raise fail("num_prefix", f"0..{length - 1}, less than the {length} tokens", num_prefix, "correct num_prefix")
    if not 1 <= topk <= length - num_prefix:
        raise fail("topk", f"1..{length - num_prefix}, the number of patches", topk, "keep fewer keys")
    if scale is None:
        scale = q.shape[3] ** -0.5
    check_positive("scale", scale)
    if labels is not None:
        check_like("labels", labels, (q.shape[0], length - num_prefix), torch.int64, q.device)
    is_too_large = q.device.type == "cuda" and (length > MAX_TOKENS or q.shape[3] > MAX_WIDTH)
    if is_too_large or dispatch.uses_reference("topk", q.device, q):
        return dispatch.reference("topk").topk_attention(
            q, k, v, topk, num_prefix=num_prefix, scale=scale, labels=labels
        )
    out, _, _, count = TOPK(q, k, v, topk, num_prefix, scale, labels)
    return out if labels is None else (out, count)


def new_tokens(like: Tensor) -> Tensor:
    """Like a (B, H, N, d) tensor; on a GPU with the heads of a token side by side, as the next linear layer reads it."""
    batch, heads, length, width = like.shape
    if dispatch.compiled_backend("topk", like.device.type) == "native":
        return like.new_empty(like.shape)
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def allocate(q, k, v, topk, num_prefix, scale, labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, two numbers per query from which the backward pass makes its weights again, and the counts."""
    batch, heads, length, _ = q.shape
    lse, threshold = (q.new_empty((batch, heads, length), dtype=torch.float32) for _ in range(2))
    counted = (batch, heads, length - num_prefix) if labels is not None else (0,)
    return new_tokens(v), lse, threshold, q.new_empty(counted, dtype=torch.int64)


def allocate_backward(grad, q, k, v, *_) -> tuple[Tensor, Tensor, Tensor]:
    return new_tokens(q), new_tokens(k), new_tokens(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, _, ctx.num_prefix, ctx.scale, _ = inputs
    out, lse, threshold, count = output
    ctx.mark_non_differentiable(lse, threshold, count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, threshold)


TOPK_BACKWARD = define(
    "topk",
    "topk_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor threshold,"
    " SymInt num_prefix, float scale) -> (Tensor, Tensor, Tensor)",
    allocate_backward,
)
TOPK = define(
    "topk",
    "topk_attention(Tensor q, Tensor k, Tensor v, SymInt topk, SymInt num_prefix, float scale, Tensor? labels)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    allocate,
    save=_save,
    backward=lambda ctx, grad, *_: (*TOPK_BACKWARD(grad, *ctx.saved_tensors, ctx.num_prefix, ctx.scale), *[None] * 4),
)
