"""What the device does to master crops: random parameters of flips, shifts and color, as functions of the rng."""

from dataclasses import dataclass

import torch
from fastmim_kernels import ColorJitter, Stream, uniform
from torch import Tensor

from fastmim.config import ConfigError


def random_flip(rng: Tensor, ids: Tensor, probability: float = 0.5) -> Tensor:
    """(B,) bool: mirror the image left to right."""
    return uniform(rng, ids, Stream.FLIP, 1)[:, 0] < probability


def random_shift(rng: Tensor, ids: Tensor, largest: int) -> Tensor:
    """(B, 2) int64 window offsets (top, left), each uniform over 0 .. largest, both ends included."""
    return (uniform(rng, ids, Stream.SHIFT, 2) * (largest + 1)).long()


@dataclass(frozen=True)
class ColorConfig:
    """Strength of the color augmentation. Source of the defaults: CMAE's target view (cmae_dataset.py)."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    """In turns of the color circle."""
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian in pixels, uniform between the two."""

    def check(self, flag: str) -> None:
        """Raises ConfigError for values out of range; `flag` is what they are options of."""
        low, high = self.blur_sigma
        shares = ("jitter_probability", "grey_probability", "blur_probability")
        rules = (
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("brightness", "contrast", "saturation")),
            ("hue", 0 <= self.hue <= 0.5, "0 .. 0.5"),
            *((name, 0 <= getattr(self, name) <= 1, "0 .. 1") for name in shares),
            ("blur_sigma", 0 <= low <= high and high > 0, "0 <= smallest <= largest, and a largest above 0"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ConfigError(f"{flag}.{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")


def random_color(rng: Tensor, ids: Tensor, config: ColorConfig) -> dict[str, object]:
    """Keyword arguments of `shift_flip_jitter` for one color augmentation per image."""
    u = uniform(rng, ids, Stream.JITTER, 12)

    def factor(column: int, strength: float) -> Tensor:
        low = max(0.0, 1 - strength)
        return low + u[:, column] * (1 + strength - low)

    low, high = config.blur_sigma
    jitter = ColorJitter(
        apply=u[:, 0] < config.jitter_probability,
        order=u[:, 1:5].argsort(dim=1, stable=True),
        brightness=factor(5, config.brightness),
        contrast=factor(6, config.contrast),
        saturation=factor(7, config.saturation),
        hue=(2 * u[:, 8] - 1) * config.hue,
    )
    blurred = u[:, 10] < config.blur_probability
    return {
        "jitter": jitter,
        "grey": u[:, 9] < config.grey_probability,
        "blur_sigma": torch.where(blurred, low + u[:, 11] * (high - low), 0.0),
        "max_blur_sigma": high,
    }
