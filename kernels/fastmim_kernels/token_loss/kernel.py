"""Linear layer and cross entropy in Triton, by chunks of rows as the reference.

The three matrix products are the vendor's; what lies between them, from logits to their gradient, is one kernel that
reads each row from memory once and writes it in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import define_triton, next_power_of_2
from . import reference


@triton.jit
def softmax_kernel(
    logits_ptr, bias_ptr, labels_ptr, loss_ptr, correct_ptr, vocabulary, WRITE: tl.constexpr, BLOCK: tl.constexpr
):
    """Program = row: its loss, whether its largest logit is the label's, and (softmax - one-hot) in place of it."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * vocabulary
    top = float("-inf")
    best = -1
    total = 0.0
    at_label = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        logits = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
        highest = tl.max(logits, 0)
        # The first of equal logits counts as the largest.
        place = tl.min(tl.where(logits == highest, columns, vocabulary), 0)
        best = tl.where(highest > top, place, best)
        higher = tl.maximum(top, highest)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)
        top = higher
        at_label += tl.sum(tl.where(columns == label, logits, 0.0), 0)
    log_sum = top + tl.log(total)
    tl.store(loss_ptr + row, log_sum - at_label)
    tl.store(correct_ptr + row, (best == label).to(tl.float32))
    if WRITE:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            logits = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if bias_ptr is not None:
                logits += tl.load(bias_ptr + columns, mask=inside, other=0).to(tl.float32)
            error = tl.exp(logits - log_sum) - tl.where(columns == label, 1.0, 0.0)
            tl.store(logits_ptr + columns, error.to(logits_ptr.dtype.element_ty), mask=inside)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, work: torch.dtype, needs: list[bool]
) -> tuple[Tensor, ...]:
    _, _, *grads = fake(x, weight, bias, labels, chunk, work, needs)
    grad_x, grad_weight, grad_bias = (grad.zero_() if i else grad for i, grad in enumerate(grads))
    rows, vocabulary = x.shape[0], weight.shape[0]
    loss, correct = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    block = min(4096, next_power_of_2(vocabulary))
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(work)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            input = x[part].to(work)
            logits = input @ matrix.T
            softmax_kernel[(input.shape[0],)](
                logits, bias, labels[part].contiguous(), loss[part], correct[part], vocabulary,
                WRITE=any(needs), BLOCK=block, num_warps=max(1, min(8, block // 512)),
            )  # fmt: skip
            if needs[0]:
                grad_x[part] = logits @ matrix
            if needs[1]:
                grad_weight += logits.T @ input
            if needs[2]:
                grad_bias += logits.sum(0, dtype=torch.float32)
    return loss.mean(), correct.mean(), grad_x, grad_weight, grad_bias


def fake(x, weight, bias, labels, chunk, work, needs) -> tuple[Tensor, ...]:
    """Loss, accuracy, and gradients of the sum of the rows' losses, empty where not needed."""
    loss = x.new_empty((), dtype=torch.float32)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    grads = [loss.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    return loss, loss.new_empty(()), *grads


def save(ctx, inputs, output) -> None:
    x, weight, bias, *_, ctx.needs = inputs
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.rows, ctx.dtypes = x.shape[0], [None if t is None else t.dtype for t in (x, weight, bias)]


def backward(ctx, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scale = upstream / ctx.rows
    grads = [
        (grad * scale).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *grads, None, None, None, None


FORWARD = define_triton(
    "triton_linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, SymInt chunk, ScalarType work, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run,
    fake,
    save,
    backward,
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """See the public function. float64 is left to the reference: this kernel adds in float32."""
    work = torch.promote_types(x.dtype, weight.dtype)
    if work == torch.float64 or (bias is not None and bias.dtype == torch.float64):
        return reference.linear_cross_entropy(x, weight, bias, labels, chunk=chunk)
    if torch.is_autocast_enabled(x.device.type):
        work = torch.get_autocast_dtype(x.device.type)
    is_training = torch.is_grad_enabled()
    needs = [is_training and t is not None and t.requires_grad for t in (x, weight, bias)]
    chunk = chunk or reference.CHUNK.get(x.device.type, reference.DEFAULT_CHUNK)
    loss, accuracy, *_ = FORWARD(x, weight, bias, labels, chunk, work, needs)
    return loss, accuracy
