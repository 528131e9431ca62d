"""InfoNCE block by block: products by torch, softmax and its gradient in C++ and in place; no (B, N) tensor."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define, no_second_derivative
from . import reference

_cross_entropy_rows = native_library.function("cross_entropy_rows")

# Logits at a time: 4 MB, of which most stays in a core's level 2 cache.
BLOCK = 1 << 20


def _forward(
    q: Tensor, k: Tensor, offset: int, temperature: float, label_smoothing: float, is_gradient_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        q, k = q.float().contiguous(), k.float().contiguous()
        batch, count = len(q), len(k)
        loss, for_q, for_k = _fake(q, k, offset, temperature, label_smoothing, is_gradient_wanted)
        losses = q.new_empty(batch, dtype=torch.float64)
        rows = max(1, min(batch, BLOCK // count))
        for start in range(0, batch, rows):
            block = slice(start, min(start + rows, batch))
            logits = q[block] @ k.T
            _cross_entropy_rows(
                logits, len(logits), count, offset + start, temperature, label_smoothing, 1 / batch, is_gradient_wanted,
                losses[block], torch.get_num_threads(),
            )  # fmt: skip
            if is_gradient_wanted:
                torch.mm(logits, k, out=for_q[block])
                for_k.addmm_(logits.T, q[block], beta=int(start > 0))
        return loss.copy_(losses.mean()), for_q, for_k


def _fake(
    q: Tensor, k: Tensor, offset: int, temperature: float, label_smoothing: float, is_gradient_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (q.shape, k.shape) if is_gradient_wanted else ((0,), (0,))
    return (q.new_empty((), dtype=torch.float32), *(q.new_empty(s, dtype=torch.float32) for s in shapes))


def _save(ctx, inputs, output) -> None:
    q, k, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = q.dtype, k.dtype


def _differentiate(ctx, grad, *_):
    if torch.is_grad_enabled():
        no_second_derivative("contrastive_loss")(ctx)
    wanted = ctx.needs_input_grad[:2]
    grads = ((grad * g).to(d) if w else None for g, d, w in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True))
    return *grads, None, None, None, None


_op = define(
    "native_contrastive_loss(Tensor q, Tensor k, SymInt offset, float temperature, float label_smoothing,"
    " bool is_gradient_wanted) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=_differentiate,
    save=_save,
)


def contrastive_loss(
    q: Tensor, k: Tensor, *, offset: int = 0, temperature: float, label_smoothing: float = 0.0
) -> Tensor:
    """See the public function. float64 is left to the reference."""
    if q.dtype not in native_library.FLOATS or k.dtype not in native_library.FLOATS:
        return reference.contrastive_loss(q, k, offset=offset, temperature=temperature, label_smoothing=label_smoothing)
    is_gradient_wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return _op(q, k, offset, temperature, label_smoothing, is_gradient_wanted)[0]
