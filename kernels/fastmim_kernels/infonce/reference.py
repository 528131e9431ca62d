"""InfoNCE as one matrix product and a cross entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autocast


def contrastive_loss(
    q: Tensor, k: Tensor, *, offset: int = 0, temperature: float, label_smoothing: float = 0.0
) -> Tensor:
    """See the public function."""
    work = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with autocast.disabled(q.device):
        logits = q.to(work) @ k.to(work).T / temperature
        labels = torch.arange(offset, offset + q.shape[0], device=q.device)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
