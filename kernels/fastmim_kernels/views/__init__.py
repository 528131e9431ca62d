"""Augmented views from uint8 master images: flip, window, color jitter, grey, blur, normalize in one op."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_float_dtype, check_images, check_like, check_positive, describe, fail, is_float
from ..registration import define

__all__ = ["ColorJitter", "shift_flip_jitter"]

# Pixels; an image of the largest usual size is one color then. Each image's borders take three times as much memory.
MAX_SIGMA = 1000


class ColorJitter(NamedTuple):
    """Color changes of each image, drawn by the caller. Codes: 0 brightness, 1 contrast, 2 saturation, 3 hue."""

    apply: Tensor  # (B,) bool; False = leave the image alone
    order: Tensor  # (B, 4) int64, a permutation of 0..3: order[b, 0] is done first
    brightness: Tensor  # (B,) factor >= 0, 1 = unchanged
    contrast: Tensor  # (B,) factor >= 0, 1 = unchanged
    saturation: Tensor  # (B,) factor >= 0, 1 = unchanged
    hue: Tensor  # (B,) in turns, 0 = unchanged, 0.5 = opposite hue


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
    """Make one view per image. In this order, each step only for the images that ask for it:

    1. flip the whole master image left-right, cut the window of ``size`` at ``offset``, scale to 0..1;
    2. color jitter, the four changes in the image's own order, each clamped to [0, 1]: brightness ``x * f``; contrast
       ``f * x + (1 - f) * mean(luma)``; saturation ``f * x + (1 - f) * luma``; hue: rotation in HSV. luma = .2989 R +
       .587 G + .114 B;
    3. grey: every channel becomes luma;
    4. Gaussian blur: separable, 2 * ceil(3 * max_blur_sigma) + 1 taps normalized to sum 1, edge pixels repeated;
    5. ``(x - mean) / std``, rounded to ``dtype``.

    Unless C = 3, saturation, hue and grey are skipped, and contrast uses the mean over all channels. Not
    differentiable. Computed in float32 (float64 for float64 images or dtype). The reference picks images by what they
    ask for: on CUDA it waits for the device, and torch.compile leaves it outside the graph.

    Args:
        images: (B, C, H, W) uint8 in 0..255, or floats in 0..1.
        size: (h, w) of the view in pixels. offset: (B, 2) int64 (top, left), None = (0, 0). flip: (B,) bool or None.
        jitter: None or a ColorJitter, of which each image has one: apply (B,) bool, False leaves the image alone; order
            (B, 4) int64, a permutation of the codes 0 brightness, 1 contrast, 2 saturation, 3 hue; brightness, contrast
            and saturation (B,) factors, 1 changes nothing; hue (B,) in turns, 0 changes nothing.
        grey: (B,) bool or None.
        blur_sigma: (B,) float in pixels, 0 = no blur, at most max_blur_sigma (a larger one is truncated); None = no
            blur.
        mean, std: C floats each in 0..1 units, or None. dtype: floating dtype of the result.

    Returns: (B, C, h, w) of ``dtype``.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Source: torchvision ``transforms.v2.functional`` (adjust_*, gaussian_blur) for the formulas; ZhichengHuang/CMAE
        auto_augment.py for which steps a view has.
    """
    size = check_images(images, size, offset, flip, mean, std)
    batch = images.shape[0]
    if jitter is not None:
        if not isinstance(jitter, (tuple, list)) or len(jitter) != 6:
            raise fail("jitter", "a ColorJitter or None", type(jitter).__name__, "pass its six tensors", TypeError)
        jitter = ColorJitter(*jitter)
        check_like("jitter.apply", jitter.apply, (batch,), torch.bool, images.device)
        check_like("jitter.order", jitter.order, (batch, 4), torch.int64, images.device)
        for name in ("brightness", "contrast", "saturation", "hue"):
            _check_amount(f"jitter.{name}", getattr(jitter, name), images)
    if grey is not None:
        check_like("grey", grey, (batch,), torch.bool, images.device)
    if blur_sigma is not None:
        _check_amount("blur_sigma", blur_sigma, images)
        check_positive("max_blur_sigma", max_blur_sigma)
        if max_blur_sigma > MAX_SIGMA:
            raise fail("max_blur_sigma", f"at most {MAX_SIGMA} pixels", max_blur_sigma, "blur less")
    check_float_dtype(dtype)
    if dispatch.is_transformed():
        raise fail("images", "a batch outside of vmap and torch.func", "one inside", "call it on the batch itself")
    if dispatch.uses_reference("views", images.device, images, dtype):
        if images.is_meta:
            # Its reference looks at values.
            return allocate(images, size, dtype)
        return dispatch.reference("views").shift_flip_jitter(
            images, size=size, offset=offset, flip=flip, jitter=jitter, grey=grey, blur_sigma=blur_sigma,
            max_blur_sigma=max_blur_sigma, mean=mean, std=std, dtype=dtype,
        )  # fmt: skip
    apply, order, *amounts = (None, None) if jitter is None else jitter
    with torch.no_grad():
        amounts = torch.stack([a.float() for a in amounts]) if amounts else None
        blur_sigma = None if blur_sigma is None else blur_sigma.float()
        radius = 0 if blur_sigma is None else math.ceil(3 * max_blur_sigma)
        return VIEWS(images, size, offset, flip, apply, order, amounts, grey, blur_sigma, radius, mean, std, dtype)


def _check_amount(name: str, amount: Tensor, images: Tensor) -> None:
    if not is_float(amount):
        raise fail(name, "a float tensor", describe(amount), "pass one number per image", TypeError)
    check_like(name, amount, (images.shape[0],), amount.dtype, images.device)


def allocate(images, size, *arguments) -> Tensor:
    return images.new_empty((*images.shape[:2], *size), dtype=arguments[-1])


VIEWS = define(
    "views",
    "shift_flip_jitter(Tensor images, SymInt[] size, Tensor? offset, Tensor? flip, Tensor? apply, Tensor? order,"
    " Tensor? amounts, Tensor? grey, Tensor? blur_sigma, int radius, float[]? mean, float[]? std, ScalarType dtype)"
    " -> Tensor",
    allocate,
)
