"""The patch contrast as one batch of similarity matrices."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import autocast


def patch_contrastive_loss(features: Tensor, src: Tensor, temperature: float) -> Tensor:
    """See the public function."""
    work = torch.promote_types(features.dtype, torch.float32)
    with autocast.disabled(features.device):
        u = F.normalize(features.to(work), dim=-1)
        logits = u @ u.transpose(1, 2) / temperature
        itself = torch.eye(src.shape[1], dtype=torch.bool, device=src.device)
        partners = (src[:, :, None] == src[:, None, :]) & ~itself
        count = partners.sum(-1)
        everyone = logits.masked_fill(itself, -torch.inf).logsumexp(-1)
        alike = (logits * partners).sum(-1) / count.clamp_min(1)
        return ((everyone - alike) * (count > 0)).mean()
