"""Views in plain torch, arranged so that each image passes each step once and pieces of the batch stay in the cache."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ColorJitter, color

# Pixel values worked on at a time on the CPU: 1 MB of float32, half of a core's level 2 cache on the machine measured.
PIECE = 1 << 18


@torch.compiler.disable
@torch.no_grad()
def shift_flip_jitter(
    images: Tensor,
    *,
    size: tuple[int, int],
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    jitter: ColorJitter | None = None,
    grey: Tensor | None = None,
    blur_sigma: Tensor | None = None,
    max_blur_sigma: float = 2.0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the public function."""
    batch, channels = images.shape[:2]
    work = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    out = torch.empty((batch, channels, *size), dtype=dtype, device=images.device)
    is_color = channels == 3
    step = max(1, PIECE // (channels * math.prod(size))) if images.device.type == "cpu" else max(1, batch)
    for start in range(0, batch, step):
        piece = slice(start, start + step)
        x = window(images[piece], size, _of(offset, piece), _of(flip, piece), work)
        if jitter is not None:
            color.jitter(x, ColorJitter(*(t[piece] for t in jitter)))
        if grey is not None and is_color:
            color.on_images(x, grey[piece], color.to_grey)
        if blur_sigma is not None:
            sigma = blur_sigma[piece]
            color.on_images(x, sigma > 0, blur, sigma.to(work), radius=math.ceil(3 * max_blur_sigma))
        if mean is not None:
            for c in range(channels):
                x[:, c].sub_(mean[c]).mul_(1 / std[c])
        out[piece] = x
    return out


def _of(tensor: Tensor | None, piece: slice) -> Tensor | None:
    return None if tensor is None else tensor[piece]


def window(
    images: Tensor, size: tuple[int, int], offset: Tensor | None, flip: Tensor | None, work: torch.dtype
) -> Tensor:
    """The flipped images' windows in 0..1: a new tensor (B, C, h, w) of dtype ``work``."""
    (h, w), width = size, images.shape[3]
    zero = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    top, left = (zero, zero) if offset is None else offset.unbind(1)
    if flip is not None:
        # Cut first, mirror afterwards: the window at ``left`` of the mirrored image is at width - w - left.
        left = torch.where(flip, width - w - left, left)
    # All windows as a view, (B, C, H - h + 1, W - w + 1, h, w), of which one per image is copied.
    windows = images.unfold(2, h, 1).unfold(3, w, 1)
    x = windows[torch.arange(len(images), device=images.device), :, top, left]
    x = x.to(work) / 255 if x.dtype == torch.uint8 else x.to(work)
    if flip is not None:
        rows = flip.nonzero().squeeze(1)
        x[rows] = x[rows].flip(3)
    return x


def blur(x: Tensor, sigma: Tensor, radius: int) -> None:
    """Gaussian blur in place: x (n, C, h, w), sigma (n, 1, 1, 1), taps -radius..radius, edges repeated."""
    taps: list[Any] = [torch.exp(-(d * d) / (2 * sigma * sigma)) for d in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    for dim, edges in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        length = x.shape[dim]
        padded = F.pad(x, edges, mode="replicate")
        torch.mul(padded.narrow(dim, radius, length), taps[0] / total, out=x)
        for d in range(1, radius + 1):
            pair = padded.narrow(dim, radius - d, length) + padded.narrow(dim, radius + d, length)
            x.addcmul_(pair, taps[d] / total)
