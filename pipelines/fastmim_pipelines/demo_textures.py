"""Procedural textures of the demo data set: small periodic tiles, and oblique windows cut out of them.

Every tile is periodic, so a window at any place, angle and zoom shows no seam. Values are uint8; color comes later.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

TILE = 256  # side of one period, pixels
VARIANTS = 3  # tiles per family, so that a class is not one picture
_TAU = 2 * math.pi
_Y, _X = np.mgrid[0:TILE, 0:TILE].astype(np.float32) / TILE  # one period = [0, 1)


def spectral_noise(rng: np.random.Generator, power: float, stretch: float = 1.0) -> np.ndarray:
    """Periodic 1/f^power noise, zero mean and unit deviation; stretch > 1 smears it along y (wood grain)."""
    fy, fx = np.fft.fftfreq(TILE)[:, None] * stretch, np.fft.rfftfreq(TILE)[None, :]
    radius = np.hypot(fy, fx)
    radius[0, 0] = 1.0
    return _noise_from_amplitude(rng, radius ** (-power / 2 - 0.5))


def band_noise(rng: np.random.Generator, cycles: float, width: float) -> np.ndarray:
    """Periodic noise around `cycles` periods per tile; width is the relative bandwidth (log units)."""
    fy, fx = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :]
    radius = np.hypot(fy, fx) * TILE
    radius[0, 0] = 1e-6
    return _noise_from_amplitude(rng, np.exp(-0.5 * (np.log(radius / cycles) / width) ** 2))


def _noise_from_amplitude(rng: np.random.Generator, amplitude: np.ndarray) -> np.ndarray:
    amplitude[0, 0] = 0.0
    phase = rng.standard_normal(amplitude.shape) + 1j * rng.standard_normal(amplitude.shape)
    field = np.fft.irfft2(amplitude * phase, s=(TILE, TILE))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _cell_distances(rng: np.random.Generator, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest and the second nearest of `cells` random points, on the torus."""
    nearest, second = np.full((2, TILE, TILE), 2, np.float32)
    for y, x in rng.random((cells, 2)).astype(np.float32):
        dy, dx = np.abs(_Y[:, :1] - y), np.abs(_X[:1] - x)
        squared = np.minimum(dy, 1 - dy) ** 2 + np.minimum(dx, 1 - dx) ** 2
        second = np.minimum(second, np.maximum(squared, nearest))
        nearest = np.minimum(nearest, squared)
    return np.sqrt(nearest), np.sqrt(second)


# Each family: rng -> (TILE, TILE) float map. About 9-14 periods per tile, so that with a tile spanning 2-3 short sides
# of an image one period is some 12 pixels of a 64-pixel crop: visible to a patch of 8 or 16.


def _stripes(rng: np.random.Generator) -> np.ndarray:
    return np.sign(np.sin(_TAU * 14 * _X + 0.6 * spectral_noise(rng, 2.6)))


def _checker(rng: np.random.Generator) -> np.ndarray:
    wave_x = np.sin(_TAU * 9 * _X + 0.3 * spectral_noise(rng, 2.6))
    return np.sign(wave_x * np.sin(_TAU * 9 * _Y + 0.3 * spectral_noise(rng, 2.6)))


def _dots(rng: np.random.Generator) -> np.ndarray:
    wave_x = np.sin(_TAU * 10 * _X + 0.3 * spectral_noise(rng, 2.6))
    return wave_x * np.sin(_TAU * 10 * _Y + 0.3 * spectral_noise(rng, 2.6)) > 0.45


def _scales(rng: np.random.Generator) -> np.ndarray:
    nearest, second = _cell_distances(rng, 110)
    return -((nearest / second) ** 2)


def _cracks(rng: np.random.Generator) -> np.ndarray:
    nearest, second = _cell_distances(rng, 110)
    return second - nearest > 0.014


def _maze(rng: np.random.Generator) -> np.ndarray:
    return np.abs(band_noise(rng, 10, 0.18)) > 0.55


def _wood(rng: np.random.Generator) -> np.ndarray:
    return spectral_noise(rng, 0.6, stretch=12.0)


def _sand(rng: np.random.Generator) -> np.ndarray:
    return band_noise(rng, 26, 0.3)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    row = np.floor(_Y * 16)
    along, across = (_X * 8 + 0.5 * (row % 2)) % 1, (_Y * 16) % 1
    tone = 1 + 0.4 * rng.standard_normal((16, 8))
    column = np.floor(_X * 8 + 0.5 * (row % 2)).astype(int) % 8
    return ((along > 0.08) & (across > 0.16)) * tone[row.astype(int), column]


def _weave(rng: np.random.Generator) -> np.ndarray:
    rising = np.sin(_TAU * (12 * _X + 6 * _Y) + spectral_noise(rng, 2.6))
    return rising + 0.9 * np.sin(_TAU * (12 * _X - 6 * _Y) + spectral_noise(rng, 2.6))


FAMILIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "scales": _scales,
    "cracks": _cracks,
    "maze": _maze,
    "wood": _wood,
    "sand": _sand,
    "bricks": _bricks,
    "weave": _weave,
}


def _as_image(field: np.ndarray) -> Image.Image:
    """Stretch the 1st..99th percentile to 0..255, and repeat the tile 3 x 3 so that windows need no wrapping."""
    low, high = np.percentile(field, (1, 99))
    tile = (np.clip((field - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.tile(tile, (3, 3)))


class TextureBank:
    """All tiles of one seed: `textures[family][variant]`, and 1/f noises for backgrounds, light and blending."""

    def __init__(self, seed: int):
        self.textures: dict[str, list[Image.Image]] = {}
        for number, (name, draw) in enumerate(FAMILIES.items()):
            variants = []
            for variant in range(VARIANTS):
                rng = np.random.default_rng([seed, 77, number, variant])
                field = draw(rng).astype(np.float32)
                field = (field - field.mean()) / field.std() + 0.25 * spectral_noise(rng, 1.0)
                variants.append(_as_image(field))
            self.textures[name] = variants
        rng = np.random.default_rng([seed, 5])
        self.rough = [_as_image(spectral_noise(rng, power)) for power in (1.6, 1.6, 2.0, 2.0)]
        self.smooth = [_as_image(spectral_noise(rng, power)) for power in (2.4, 2.4, 3.0, 3.0)]
        self.grain = rng.standard_normal((768, 768)).astype(np.float32)


def window(tile: Image.Image, size: tuple[int, int], span_px: float, rng: np.random.Generator) -> Image.Image:
    """A (width, height) window of a repeated tile at a random place and angle; one period covers span_px pixels."""
    width, height = size
    diagonal = math.hypot(width, height)
    scale = min(TILE / span_px, 2 * TILE / diagonal)  # tile pixels per window pixel; at most two periods
    angle = rng.uniform(0, _TAU)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    margin = diagonal * scale / 2
    center_x, center_y = rng.uniform(margin, 3 * TILE - margin, 2)
    matrix = (
        cos,
        sin,
        center_x - (cos * width + sin * height) / 2,
        -sin,
        cos,
        center_y - (cos * height - sin * width) / 2,
    )
    return tile.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
