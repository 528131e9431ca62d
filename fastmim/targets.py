"""Pixel targets: what the decoder shall predict, the loss on it, and pictures of it."""

from typing import NamedTuple

import torch
from fastmim_kernels import masked_pixel_loss, patchify_gather
from torch import Tensor

from fastmim.config import ModelSpec
from fastmim.masking import MaskPlan

VARIANCE_EPS = 1e-6


class Reconstruction(NamedTuple):
    """Three pictures per image, each (B, C, H, W) float32 in [0, 1]."""

    view: Tensor
    masked: Tensor
    """Masked patches are mid-gray."""
    output: Tensor
    """Visible patches as they are, masked patches as predicted."""


class PixelTarget:
    """Pixels of the masked patches, normalized per patch if asked to.

    Every method takes `window`: the keyword arguments `size`, `offset` and `flip` of `patchify_gather`, which say
    what part of the master crop the view is.

    Source: facebookresearch/mae models_mae.py `forward_loss`, unbiased variance.
    """

    def __init__(self, model: ModelSpec, normalize: bool):
        self.model, self.normalize = model, normalize

    def patches(self, images: Tensor, ids: Tensor | None, **window: object) -> Tensor:
        """(B, K, V) patches of the view, normalized by the data set's mean and standard deviation."""
        m = self.model
        return patchify_gather(images, ids, m.patch_size, mean=m.mean, std=m.std, **window)

    def loss(self, pred: Tensor, images: Tensor, ids_masked: Tensor, kind: str = "mse", **window: object) -> Tensor:
        """Mean error of predictions (B, M, V) of the patches (B, M); kind: see `masked_pixel_loss`."""
        m = self.model
        return masked_pixel_loss(
            pred, images, ids_masked, m.patch_size, mean=m.mean, std=m.std, norm=self.normalize, eps=VARIANCE_EPS,
            kind=kind, **window,
        )  # fmt: skip

    def picture(self, pred: Tensor, images: Tensor, plan: MaskPlan, **window: object) -> Reconstruction:
        """Pictures of predictions (B, L, V) for all patches.

        With per-patch normalization the network never predicts a patch's mean and contrast: they are taken from the
        original, so these pictures show more than the network knows.
        """
        m = self.model
        mean = torch.tensor(m.mean, device=images.device).repeat(m.patch_size**2)
        std = torch.tensor(m.std, device=images.device).repeat(m.patch_size**2)
        original = self.patches(images, None, **window)
        pred = pred.float()
        if self.normalize:
            pred = pred * (original.var(-1, keepdim=True) + VARIANCE_EPS).sqrt() + original.mean(-1, keepdim=True)
        original, pred = original * std + mean, pred * std + mean
        mask = plan.mask.unsqueeze(-1)
        rows = (original, original * (1 - mask) + 0.5 * mask, original * (1 - mask) + pred * mask)
        return Reconstruction(*(unpatchify(row, m).clamp(0, 1) for row in rows))


def unpatchify(patches: Tensor, model: ModelSpec) -> Tensor:
    """(B, L, V) in (row, column, channel) order -> (B, C, H, W)."""
    (h, w), p = model.grid, model.patch_size
    x = patches.view(len(patches), h, w, p, p, model.in_chans)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), model.in_chans, h * p, w * p)
