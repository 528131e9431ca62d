"""One demo picture: a textured silhouette with shading and shadow before a background, under a light field, with grain.

The label decides two things only: the silhouette and the texture of the main object. Colors, pose, size, background,
light, distractors, blur and grain are drawn without looking at the label.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .demo_textures import FAMILIES, TextureBank, window

_TAU = 2 * math.pi
_GROUND_CONTRAST = 20.0  # as DemoSpec.contrast, of backgrounds
_ASPECTS = (4 / 3, 4 / 3, 4 / 3, 3 / 4, 3 / 4, 3 / 2, 2 / 3, 1.0)  # width / height; landscape most often

# (silhouette, texture) pairs: neither half names a class by its color or its size.
CLASSES: tuple[tuple[str, str], ...] = (
    ("disc", "stripes"),
    ("triangle", "checker"),
    ("slab", "dots"),
    ("star", "scales"),
    ("cross", "cracks"),
    ("ring", "maze"),
    ("gear", "wood"),
    ("crescent", "sand"),
    ("flower", "bricks"),
    ("arrow", "weave"),
)


@dataclass(frozen=True)
class DemoSpec:
    """What the pictures look like. Lengths without a unit are fractions of the image's short side.

    Defaults chosen by measurement (3,000 + 600 pictures, k-NN-20, chance 10 %): raw pixels (24 x 24, standardized) name
    29 % of the classes, statistics of 32 Gabor filters 91 %: the class is there to be seen, but not in the pixels.
    """

    short_side_px: tuple[int, int] = (96, 176)  # uniform; the long side follows from the aspect, at most 264
    object_radius: tuple[float, float] = (0.42, 0.60)
    texture_span: tuple[float, float] = (1.5, 2.2)  # one texture tile (9-14 periods) covers this many short sides
    tilt_rad: float = math.pi  # the object turns by at most this much either way
    contrast: float = 100.0  # smallest difference between the tones of an object's two colors, gray levels
    saturation: float = 0.3  # of all colors: 1 would be as vivid as 8 bits allow
    distractors: int = 1  # at most; irregular blobs with any texture
    background_texture: float = 0.1  # chance that the background carries a texture, too
    grain: tuple[float, float] = (1.0, 4.0)  # deviation of the sensor noise, gray levels
    quality: tuple[int, ...] = (85, 90, 93, 95)  # of the JPEG files


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def silhouette(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Outline (n, 2) of about unit radius, and the outline of its hole or None; proportions vary a little."""
    circle = np.linspace(0, _TAU, 90, endpoint=False)
    one = np.ones_like(circle)
    vary = 1 + 0.12 * rng.uniform(-1, 1)
    if name == "disc":
        return _polar(one, circle) * [1, 0.8 * vary], None
    if name == "triangle":
        return _polar(1 + 0.1 * rng.uniform(-1, 1, 3), np.arange(3) * _TAU / 3), None
    if name == "slab":
        return np.array([[-1, -0.6], [1, -0.6], [1, 0.6], [-1, 0.6]]) * [1, vary], None
    if name == "star":
        return _polar(np.where(np.arange(10) % 2, 0.42 * vary, 1.0), np.arange(10) * _TAU / 10), None
    if name == "cross":
        b = 0.3 * vary
        quarter = np.array([[b, -1], [b, -b], [1, -b]])
        turns = [np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in np.arange(4) * _TAU / 4]
        return np.concatenate([quarter @ turn.T for turn in turns]), None
    if name == "ring":
        return _polar(one, circle), _polar(0.5 * vary * one, circle)
    if name == "gear":
        return _polar(1 - 0.2 * (np.sin(10 * circle) > 0), circle), _polar(0.25 * one, circle)
    if name == "crescent":
        outer = _polar(np.ones(60), np.linspace(0.3 * math.pi, 1.7 * math.pi, 60))
        tip = np.array([math.cos(0.3 * math.pi), 0])
        return np.concatenate([outer, tip + (outer[::-1] - tip) * [0.4 * vary, 1]]), None
    if name == "flower":
        return _polar(0.7 + 0.3 * np.cos(6 * circle), circle), None
    if name == "arrow":
        head = [[-1, -0.25], [0.1, -0.25], [0.1, -0.75], [1, 0], [0.1, 0.75], [0.1, 0.25], [-1, 0.25]]
        return np.array(head) * [1, vary], None
    if name == "blob":
        radius = 1 + sum(rng.normal(0, 0.25 / k) * np.cos(k * circle + rng.uniform(0, _TAU)) for k in range(1, 6))
        return _polar(radius, circle), None
    raise ValueError(f"silhouette: expected one of {[shape for shape, _ in CLASSES]} or blob, got {name!r}")


class Scene:
    """Draws the pictures of one (seed, spec). Picture = f(seed, split, index); label = index modulo the class count."""

    def __init__(self, seed: int, spec: DemoSpec):
        self.seed, self.spec = seed, spec
        self.bank = TextureBank(seed)

    def jpeg(self, split: int, index: int) -> bytes:
        """The finished file of one picture: the same bytes in whatever process it is drawn."""
        rng = np.random.default_rng([self.seed, split, index])
        shape, texture = CLASSES[index % len(CLASSES)]
        picture = self._background(rng)
        for _ in range(int(rng.integers(0, self.spec.distractors + 1))):
            self._add_object(picture, "blob", str(rng.choice(list(FAMILIES))), (0.12, 0.25), rng)
        self._add_object(picture, shape, texture, self.spec.object_radius, rng)
        out = io.BytesIO()
        self._expose(picture, rng).save(
            out, "JPEG", quality=int(rng.choice(self.spec.quality)), subsampling=int(rng.choice((0, 2, 2)))
        )
        return out.getvalue()

    def _background(self, rng: np.random.Generator) -> Image.Image:
        low, high = self.spec.short_side_px
        short, aspect = int(rng.integers(low, high + 1)), float(rng.choice(_ASPECTS))
        size = (round(short * aspect), short) if aspect >= 1 else (short, round(short / aspect))
        saturation = self.spec.saturation
        ground = _colorize(
            window(_pick(self.bank.rough, rng), size, short * rng.uniform(1, 4), rng), rng, _GROUND_CONTRAST, saturation
        )
        if rng.random() < self.spec.background_texture:
            family = self.bank.textures[str(rng.choice(list(FAMILIES)))]
            pattern = _colorize(
                window(_pick(family, rng), size, short * rng.uniform(1, 4), rng), rng, _GROUND_CONTRAST, saturation
            )
            weight = window(_pick(self.bank.smooth, rng), size, short * rng.uniform(1, 3), rng)
            strength = rng.uniform(0.2, 0.7)
            ground.paste(pattern, mask=weight.point([int(strength * level) for level in range(256)]))
        blur = rng.uniform(0, 1.5)
        return ground.filter(ImageFilter.BoxBlur(blur)) if blur > 0.4 else ground

    def _add_object(
        self,
        picture: Image.Image,
        shape: str,
        texture: str,
        radius_range: tuple[float, float],
        rng: np.random.Generator,
    ) -> None:
        """Paste one object with its soft shadow into the picture, wholly or nearly inside the frame."""
        short = min(picture.size)
        radius = short * rng.uniform(*radius_range)
        angle, squeeze, shear = rng.uniform(-1, 1) * self.spec.tilt_rad, rng.uniform(0.8, 1), rng.uniform(-0.2, 0.2)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        pose = turn @ np.array([[1, shear], [0, squeeze]]) * radius

        half = int(1.3 * radius) + 4  # of the square patch that holds the object
        outlines = [2 * (ring @ pose.T + half) for ring in silhouette(shape, rng) if ring is not None]
        mask = Image.new("L", (4 * half, 4 * half))  # drawn at twice the size, then averaged
        for ring, fill in zip(outlines, (255, 0)):
            ImageDraw.Draw(mask).polygon([tuple(point) for point in ring], fill=fill)
        mask = mask.reduce(2)

        span_px = short * rng.uniform(*self.spec.texture_span)
        surface = window(_pick(self.bank.textures[texture], rng), mask.size, span_px, rng)
        colored = np.asarray(_colorize(surface, rng, self.spec.contrast, self.spec.saturation), np.float32)
        slope_x, slope_y = rng.uniform(-0.35, 0.35, 2)
        ramp = np.linspace(-1, 1, 2 * half, dtype=np.float32)
        shaded = colored * (1 + slope_x * ramp[None, :] + slope_y * ramp[:, None])[..., None]

        left, top = (
            int(rng.uniform(min(0.85 * radius, side / 2), max(side - 0.85 * radius, side / 2))) - half
            for side in picture.size
        )
        shadow = mask.filter(ImageFilter.BoxBlur(0.08 * radius)).point([int(0.55 * level) for level in range(256)])
        picture.paste((0, 0, 0), (left + int(0.08 * radius), top + int(0.1 * radius)), shadow)
        picture.paste(Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8)), (left, top), mask)

    def _expose(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Light field, white balance and sensor grain."""
        width, height = picture.size
        light = window(_pick(self.bank.smooth, rng), picture.size, height * rng.uniform(2, 6), rng)
        gain = (rng.uniform(0.6, 0.9) + np.asarray(light, np.float32) * (0.4 / 255))[..., None]
        balance = rng.uniform(0.85, 1.15, 3).astype(np.float32)
        top, left = rng.integers(0, 768 - height), rng.integers(0, 768 - width)
        grain = self.bank.grain[top : top + height, left : left + width, None] * np.float32(
            rng.uniform(*self.spec.grain)
        )
        exposed = np.asarray(picture, np.float32) * (gain * balance) + grain
        return Image.fromarray(np.clip(exposed, 0, 255).astype(np.uint8))


def _pick(images: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    return images[rng.integers(len(images))]


def _colorize(gray: Image.Image, rng: np.random.Generator, contrast: float, saturation: float) -> Image.Image:
    """Map gray levels to a ramp between two random colors whose tones are at least `contrast` gray levels apart."""
    tones = rng.uniform(20, 235, 2)
    while abs(tones[0] - tones[1]) < contrast:
        tones = rng.uniform(20, 235, 2)
    tints = rng.uniform(-110, 110, (2, 3))
    ends = tones[:, None] + saturation * (tints - tints.mean(axis=1, keepdims=True))
    ramp = np.clip(np.linspace(ends[0], ends[1], 256), 0, 255).astype(np.uint8)
    return Image.fromarray(ramp[np.asarray(gray)])
