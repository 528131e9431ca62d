"""Contrast among the patches of a mixture: same image together, other images apart."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_like, check_positive, check_rank, fail, is_float
from ..registration import define

__all__ = ["patch_contrastive_loss"]


def patch_contrastive_loss(features: Tensor, src: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss inside each mixture, where the label of a patch is the image that it comes from.

    With unit vectors u and the partners P(i) = {p != i, src_p = src_i}: mean over mixtures and patches i of
    ``-1 / |P(i)| * sum_p log(exp(u_i . u_p / t) / sum_{a != i} exp(u_i . u_a / t))``. A patch without a partner counts
    as 0. Both sides carry the gradient. Computed in float32 even under autocast.

    In plain torch, for one mixture: ``u = F.normalize(features, dim=1)``; ``s = u @ u.T / t``; ``own = eye(L).bool()``;
    ``partners = (src[:, None] == src) & ~own``; ``count = partners.sum(1)``; ``everyone = s.masked_fill(own,
    -inf).logsumexp(1)``; ``((everyone - (s * partners).sum(1) / count.clamp(min=1)) * (count > 0)).mean()``.

    Args:
        features: (G, L, D) floats, normalized here; patch tokens only.
        src: (G, L) int64, any label per patch.
        temperature: t, above 0.

    Returns: scalar float32 (float64 for float64 features); log(L - 1) for features without structure. Differentiable
        with respect to features.
    Raises: ValueError for no mixture, fewer than 2 patches, unfitting shapes or temperature; TypeError for dtypes.
    Source: Khosla et al., "Supervised contrastive learning", arXiv 2004.11362, eq. 2 (and its public code, where an
        anchor without a partner costs 0); MixedAE, arXiv 2303.17152, for the labels.
    """
    check_rank("features", features, "(G, L, D)")
    groups, length, _ = features.shape
    if not is_float(features):
        raise fail("features", "floats", features.dtype, "convert them", TypeError)
    if groups == 0 or length < 2:
        raise fail("features", "at least 1 mixture of 2 patches", tuple(features.shape), "give a batch of mixtures")
    check_rank("src", src, "(G, L)")
    check_like("src", src, (groups, length), torch.int64, features.device)
    check_positive("temperature", temperature)
    if dispatch.uses_reference("patch_contrast", features.device, features):
        return dispatch.reference("patch_contrast").patch_contrastive_loss(features, src, temperature)
    return PATCH_CONTRAST(features, src, temperature)[0]


def allocate(features: Tensor, src: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and of each patch 1 / norm, log-sum-exp and 1 / number of partners."""
    rows = [features.new_empty(features.shape[:2], dtype=torch.float32) for _ in range(3)]
    return features.new_empty((), dtype=torch.float32), *rows


def allocate_backward(grad: Tensor, features: Tensor, *_) -> Tensor:
    return features.new_empty(features.shape)


def _save(ctx, inputs, output) -> None:
    features, src, ctx.temperature = inputs
    ctx.save_for_backward(features, src, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


PATCH_CONTRAST_BACKWARD = define(
    "patch_contrast",
    "patch_contrastive_loss_backward(Tensor grad, Tensor features, Tensor src, Tensor inverse, Tensor lse,"
    " Tensor share, float temperature) -> Tensor",
    allocate_backward,
)
PATCH_CONTRAST = define(
    "patch_contrast",
    "patch_contrastive_loss(Tensor features, Tensor src, float temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    allocate,
    save=_save,
    backward=lambda ctx, grad, *_: (PATCH_CONTRAST_BACKWARD(grad, *ctx.saved_tensors, ctx.temperature), None, None),
)
