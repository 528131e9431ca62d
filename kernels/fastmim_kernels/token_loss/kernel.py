"""Linear layer and cross entropy in Triton, by chunks of rows as the reference.

The three matrix products are the vendor's; what lies between them, from logits to their gradient, is one kernel that
reads each row from memory once and writes it in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from . import allocate


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


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, work: torch.dtype, needs: list[bool]
) -> tuple[Tensor, ...]:
    _, _, *grads = allocate(x, weight, bias, labels, chunk, work, needs)
    grad_x, grad_weight, grad_bias = (grad.zero_() if i else grad for i, grad in enumerate(grads))
    rows, vocabulary = x.shape[0], weight.shape[0]
    loss, correct = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    bias = None if bias is None else bias.contiguous()
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
