"""What turns the crops of a batch into the token ids of masked patches."""

from typing import Protocol

import torch
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor

from fastmim.config import ModelSpec


class Tokenizer(Protocol):
    """What can take the d-VAE's place: an nn.Module with two attributes."""

    vocabulary: int
    """Number of different tokens."""
    stride: int
    """Pixels per token and side: its images have patches x stride pixels, so that a token stands for a patch."""

    def __call__(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Token ids.

        Args:
            images: (B, C, rows x stride, columns x stride) float32 in [0, 1].
            ids: (B, M) int64, patches in raster order whose tokens are wanted; None: all.

        Returns:
            (B, M) int64 in 0 .. vocabulary - 1.
        """
        ...


def image_size(network: Tokenizer, model: ModelSpec) -> tuple[int, int]:
    """(height, width) of the images that give a token per patch of the model."""
    return model.grid[0] * network.stride, model.grid[1] * network.stride


class TokenTarget:
    """Token ids from a second crop of the batch, which has the model's crop's box and flip.

    No nn.Module on purpose: the tokenizer is no part of what is trained. So it is in no checkpoint and no export, ZeRO
    does not shard it and DDP does not watch it; it follows the first batch to its device.

    Args:
        network: the tokenizer.
        model: sizes.
        crop: index of its crop in the batch.
    """

    def __init__(self, network: Tokenizer, model: ModelSpec, crop: int = 1):
        self.network, self.crop = network.eval(), crop
        self.vocabulary = network.vocabulary
        self.size = image_size(network, model)
        self.device = torch.device("cpu")

    def crops(self, scale: tuple[float, float]) -> tuple[CropSpec, ...]:
        """What the loader shall give besides the model's crop. Lanczos: Atten4Vis/CAE furnace/datasets.py."""
        return (CropSpec(size=self.size, scale=scale, filter="lanczos"),)

    @torch.no_grad()
    def __call__(self, batch: Batch, rng: Tensor, flip: Tensor, ids: Tensor | None) -> Tensor:
        """(B, M) token ids of the patches `ids` (B, M), or of all."""
        images = batch.crops[self.crop]
        if images.device != self.device:
            self.network.to(images.device)
            self.device = images.device
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        return self.network(images.float() / 255, ids)
