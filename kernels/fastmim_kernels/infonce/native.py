"""InfoNCE block by block: products by torch, softmax and its gradient in C++ and in place; no (B, N) tensor."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate

_cross_entropy_rows = native_library.function("cross_entropy_rows")

# Logits at a time: 4 MB, of which most stays in a core's level 2 cache.
BLOCK = 1 << 20


def contrastive_loss(
    q: Tensor, k: Tensor, offset: int, temperature: float, label_smoothing: float, is_gradient_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", enabled=False):
        q, k = q.float().contiguous(), k.float().contiguous()
        batch, count = len(q), len(k)
        loss, for_q, for_k = allocate(q, k, offset, temperature, label_smoothing, is_gradient_wanted)
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
