"""Resizing as two matrix products with the filter's weights: along the rows, then along the columns."""

import torch
from torch import Tensor

from .. import autocast
from ..patches.reference import constants


@torch.no_grad()
def random_resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    interpolation: str = "bicubic",
    flip: Tensor | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """See the public function."""
    work = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    left, top, width, height = boxes.double().unbind(1)
    across = weights(left, width, size[1], images.shape[3], interpolation).to(work)
    down = weights(top, height, size[0], images.shape[2], interpolation).to(work)
    is_level = images.dtype == torch.uint8
    with autocast.disabled(images.device):
        x = levels(images.to(work) @ across[:, None].mT, is_level)
        x = levels(down[:, None] @ x, is_level)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if dtype == torch.uint8:
        return x.to(dtype)
    x = x / 255 if is_level else x
    if mean is not None:
        shift, scale = (constants(list(values), x, x.dtype).view(-1, 1, 1) for values in (mean, std))
        x = (x - shift) / scale
    return x.to(dtype)


def weights(start: Tensor, length: Tensor, count: int, limit: int, interpolation: str) -> Tensor:
    """(B, count, limit) float64: what each of ``limit`` pixels adds to each of the ``count`` that the range becomes."""
    ratio = length / count
    places = torch.arange(count, dtype=torch.float64, device=start.device) + 0.5
    centers = start[:, None] + places * ratio[:, None]
    pixels = torch.arange(limit, dtype=torch.float64, device=start.device) + 0.5
    # Shrinking widens the filter, so that every pixel counts.
    distance = (pixels - centers[:, :, None]).abs() / ratio.clamp_min(1)[:, None, None]
    weight = triangle(distance) if interpolation == "bilinear" else cubic(distance)
    return weight / weight.sum(2, keepdim=True)


def triangle(x: Tensor) -> Tensor:
    """Linear interpolation; x >= 0."""
    return (1 - x).clamp_min(0)


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2; x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def levels(x: Tensor, is_level: bool) -> Tensor:
    """Rounded to whole levels, half up, as Pillow's integers."""
    return (x + 0.5).floor_().clamp_(0, 255) if is_level else x
