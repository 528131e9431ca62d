"""Linear layer and cross entropy by chunks of rows, gradients included."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import autocast, dispatch

# Rows at a time by device type. CPU: 1568 rows, D = 256, V = 8192, forward and backward with chunks of 64, 256, 1024:
# 196, 185, 206 ms in float32, 136, 99, 133 ms in bfloat16; without chunks 255 and 197 ms (1 thread, median of 7).
# Elsewhere large enough to fill the device: 128 MiB of float32 logits at V = 8192.
CHUNK = {"cpu": 256}
DEFAULT_CHUNK = 4096


def default_chunk(device_type: str) -> int:
    """Rows at a time."""
    return CHUNK.get(device_type, DEFAULT_CHUNK)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """See the public function."""
    if dispatch.is_transformed():
        return whole(x, weight, bias, labels)
    chunk = chunk or default_chunk(x.device.type)
    work = torch.promote_types(x.dtype, weight.dtype)
    if work != torch.float64:
        work = autocast.dtype(x.device) or work
    return ChunkedCrossEntropy.apply(x, weight, bias, labels, chunk, work, torch.is_grad_enabled())


def whole(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same with all logits at once, by ops that transforms (torch.func, vmap) look into."""
    work = torch.promote_types(x.dtype, weight.dtype)
    logits = F.linear(x.to(work), weight.to(work), None if bias is None else bias.to(work))
    logits = logits.to(torch.promote_types(work, torch.float32))
    accuracy = (logits.argmax(1) == labels).to(torch.float32).mean()
    return F.cross_entropy(logits, labels), accuracy


class ChunkedCrossEntropy(torch.autograd.Function):
    """dL/dlogits = (softmax - one-hot) / N needs nothing from later layers, so the forward pass can go back at once."""

    @staticmethod
    def forward(ctx, x, weight, bias, labels, chunk, work, is_training):
        needs_x, needs_weight, needs_bias = (is_training and n for n in ctx.needs_input_grad[:3])
        sums = torch.promote_types(work, torch.float32)
        rows, vocabulary = len(x), len(weight)
        loss = torch.zeros((), dtype=sums, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        grad_x = x.new_empty(x.shape, dtype=sums) if needs_x else None
        grad_weight = weight.new_zeros(weight.shape, dtype=sums) if needs_weight else None
        grad_bias = weight.new_zeros(vocabulary, dtype=sums) if needs_bias else None
        with autocast.disabled(x.device):
            matrix = weight.to(work)
            for start in range(0, rows, chunk):
                part = slice(start, start + chunk)
                input, label = x[part].to(work), labels[part, None]
                logits = (input @ matrix.T).to(sums)
                if bias is not None:
                    logits += bias
                correct += (logits.argmax(1, keepdim=True) == label).sum()
                log_sum = logits.logsumexp(1, keepdim=True)
                loss += (log_sum - logits.gather(1, label)).sum()
                if not (needs_x or needs_weight or needs_bias):
                    continue
                # In place of the logits. The division by N comes last, with the loss scale: in float16 it gives zeros.
                error = logits.sub_(log_sum).exp_()
                error.scatter_add_(1, label, error.new_full(label.shape, -1.0))
                if needs_bias:
                    grad_bias += error.sum(0)
                error = error.to(work)
                if needs_x:
                    grad_x[part] = error @ matrix
                if needs_weight:
                    grad_weight += error.T @ input
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        ctx.rows, ctx.dtypes = rows, [None if t is None else t.dtype for t in (x, weight, bias)]
        accuracy = correct.to(torch.float32) / rows
        ctx.mark_non_differentiable(accuracy)
        return loss / rows, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        scale = grad_loss / ctx.rows
        grads = [None if g is None else (g * scale).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None, None, None
