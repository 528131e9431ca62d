"""Linear layer and cross entropy in one, for large vocabularies: the logits are never held as a whole."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, dispatch
from ..checks import check_integer, check_like, check_rank, fail, is_float, is_readable
from ..registration import define, refuse_second_derivative

__all__ = ["TokenLoss", "linear_cross_entropy"]


class TokenLoss(NamedTuple):
    loss: Tensor  # scalar, mean over the rows
    accuracy: Tensor  # scalar float32 in [0, 1], detached: the share of rows whose largest logit is the label's


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int | None = None
) -> TokenLoss:
    """Mean cross entropy of the logits ``x @ weight.T + bias``, and how many of them are right.

    The same as ``F.cross_entropy(F.linear(x, weight, bias).float(), labels)``, ``chunk`` rows at a time, with the
    gradients computed on the way: three matrix products as without chunks, nothing is computed twice, and what is kept
    for the backward pass has the size of x and of weight. Under autocast the products run in its dtype; softmax, sums
    over rows and gradients of weight and bias are float32.

    Args:
        x: (N, D) floats, N at least 1. weight: (V, D). bias: (V,) or None.
        labels: (N,) int64 in 0..V-1 (values are checked on the CPU only).
        chunk: rows at a time: chunk * V logits exist at once. None: what suits the device.

    Returns: TokenLoss, a NamedTuple of two scalars: loss, float32 (float64 for float64 inputs), differentiable once with
        respect to x, weight and bias; accuracy, float32 in 0..1, the share of rows whose largest logit is the label's.
    Raises: ValueError, TypeError for shapes, dtypes or devices that do not fit; IndexError for labels out of range.
    Source: Hsu et al., Liger Kernel, arXiv 2410.10989, section 3.2 (gradients in the forward pass, chunk by chunk).
    """
    check_rank("x", x, "(N, D)")
    check_rank("weight", weight, "(V, D)")
    if x.shape[1] != weight.shape[1] or x.shape[0] == 0 or weight.shape[0] == 0:
        got = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise fail("x, weight", "(N, D) and (V, D), not empty", got, "give both the same width")
    if bias is not None:
        check_rank("bias", bias, "(V,)")
    floats = [x, weight] if bias is None else [x, weight, bias]
    if any(t.device != x.device or not is_float(t) for t in floats):
        got = ", ".join(f"{t.dtype} on {t.device}" for t in floats)
        raise fail("x, weight, bias", "floats on one device", got, "move or convert them")
    if bias is not None:
        check_like("bias", bias, (weight.shape[0],), bias.dtype, x.device)
    check_like("labels", labels, (x.shape[0],), torch.int64, x.device)
    if is_readable(labels):
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= weight.shape[0]:
            expected = f"class numbers in 0..{weight.shape[0] - 1}"
            raise fail("labels", expected, f"{low}..{high}", "check the vocabulary", IndexError)
    if chunk is not None:
        check_integer("chunk", chunk)
    if chunk is not None and chunk < 1:
        raise fail("chunk", "at least 1 row", chunk, "correct chunk")
    if dispatch.uses_reference("token_loss", x.device, x, weight, bias):
        return TokenLoss(*dispatch.reference("token_loss").linear_cross_entropy(x, weight, bias, labels, chunk=chunk))
    work = autocast.dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
    is_training = torch.is_grad_enabled()
    needs = [is_training and t is not None and t.requires_grad for t in (x, weight, bias)]
    chunk = chunk or dispatch.reference("token_loss").default_chunk(x.device.type)
    loss, accuracy, *_ = TOKEN_LOSS(x, weight, bias, labels, chunk, work, needs)
    return TokenLoss(loss, accuracy)


def allocate(x, weight, bias, labels, chunk, work, needs) -> tuple[Tensor, ...]:
    """Loss, accuracy, and gradients of the sum of the rows' losses, empty where not needed."""
    loss = x.new_empty((), dtype=torch.float32)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    grads = [loss.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    return loss, loss.new_empty(()), *grads


def _save(ctx, inputs, output) -> None:
    x, weight, bias, *_, ctx.needs = inputs
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.rows, ctx.dtypes = x.shape[0], [None if t is None else t.dtype for t in (x, weight, bias)]


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        refuse_second_derivative("linear_cross_entropy")
    scale = grad / ctx.rows
    grads = [
        (g * scale).to(dtype) if need else None
        for g, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *grads, None, None, None, None


TOKEN_LOSS = define(
    "token_loss",
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, SymInt chunk, ScalarType work,"
    " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    allocate,
    save=_save,
    backward=_backward,
)
