"""Top-K attention with the whole score matrix: select, mask, softmax."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast


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
    """See the public function."""
    work = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with autocast.disabled(q.device):
        # Scores of bfloat16 are 2**-8 apart: many keys would tie with the K-th.
        scores = (q.to(work) * scale) @ k.to(work).transpose(-2, -1)
        with torch.no_grad():
            dropped = unselected(scores, topk, num_prefix)
            # Unseen by autograd, and rightly so: softmax gives no gradient to a score whose weight is 0.
            scores.masked_fill_(dropped, -torch.inf)
        out = scores.softmax(-1).to(v.dtype) @ v
    if labels is None:
        return out
    is_same = (labels[:, :, None] == labels[:, None, :])[:, None]
    kept = ~dropped[..., num_prefix:, num_prefix:]
    return out, (kept & is_same).sum(-1)


def unselected(scores: Tensor, topk: int, num_prefix: int) -> Tensor:
    """(..., N, N) bool: the keys that a query does not attend to."""
    best = scores[..., num_prefix:, num_prefix:].topk(topk, dim=-1, sorted=False).values
    least = F.pad(best.amin(-1, keepdim=True), (0, 0, num_prefix, 0), value=-torch.inf)
    # Not `~(scores >= least)`: a NaN among the scores shall come through to the result.
    dropped = scores < least
    dropped[..., :num_prefix] = False
    return dropped
