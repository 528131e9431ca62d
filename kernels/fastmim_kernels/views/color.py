"""Color changes, each in place on x (n, C, h, w) in 0..1 with per-image amounts (n, 1, 1, 1).

Source: torchvision ``_functional_tensor.py`` (adjust_brightness, adjust_contrast, adjust_saturation, rgb_to_grayscale).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ColorJitter

LUMA = (0.2989, 0.587, 0.114)


def jitter(x: Tensor, amounts: ColorJitter) -> None:
    """All four changes, each image in its own order. Grouped by place and change, so that an image passes each once."""
    changes = (brightness, contrast, saturation, hue)
    for place in range(4):
        code = torch.where(amounts.apply, amounts.order[:, place], -1)
        for i, (change, amount) in enumerate(zip(changes, amounts[2:], strict=True)):
            if x.shape[1] == 3 or change in (brightness, contrast):
                on_images(x, code == i, change, amount.to(x.dtype))


def on_images(x: Tensor, chosen: Tensor, change: Callable, *amounts: Tensor, **options: int) -> None:
    """Apply ``change`` in place to the chosen (B,) images of x, with their rows of each (B,) amount."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return
    amounts = [a[rows].view(-1, 1, 1, 1) for a in amounts]
    if len(rows) == len(x):
        change(x, *amounts, **options)
    else:
        part = x.index_select(0, rows)
        change(part, *amounts, **options)
        x.index_copy_(0, rows, part)


def luma(x: Tensor) -> Tensor:
    """Grey image, (n, 1, h, w)."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def to_grey(x: Tensor) -> None:
    """Every channel becomes luma."""
    x.copy_(luma(x).expand_as(x))


def brightness(x: Tensor, factor: Tensor) -> None:
    """x * factor."""
    x.mul_(factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> None:
    """Blend with the mean of the grey image."""
    mean = x.mean((2, 3), keepdim=True)
    mean = luma(mean) if x.shape[1] == 3 else mean.mean(1, keepdim=True)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> None:
    """Blend with the grey image."""
    grey = luma(x).mul_(1 - factor)
    x.mul_(factor).add_(grey).clamp_(0, 1)


def hue(x: Tensor, turns: Tensor) -> None:
    """Rotate the hue by ``turns``; value and chroma stay.

    With value v, chroma c and hue h in sextants (0..6), a channel is v - c * clamp(|h' - center| - 1, 0, 1) with center
    2 for green and 4 for blue; for red it is v - c * (1 - clamp(|h' - 3| - 1, 0, 1)), h' being the rotated hue. This is
    HSV -> RGB without its six cases. The result lies between the old minimum and maximum, so nothing has to be clamped.
    """
    red, green, blue = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    sextant = torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4))
    sextant = torch.where(value == red, green - blue, sextant)
    # Grey pixels have chroma 0 and any hue; the bound only avoids 0 / 0.
    sextant.div_(chroma.clamp_min(1e-12)).add_(6 * turns)
    sextant.sub_((sextant / 6).floor_(), alpha=6)

    def ramp(center: float) -> Tensor:
        return (sextant - center).abs_().sub_(1).clamp_(0, 1)

    torch.addcmul(low, chroma, ramp(3), out=red)
    torch.addcmul(value, chroma, ramp(2), value=-1, out=green)
    torch.addcmul(value, chroma, ramp(4), value=-1, out=blue)
