"""Random resized crops on the device: each image's box, resized with antialiasing as Pillow does it.

There is no native twin: on a CPU, images reach a batch already cropped and resized by the loader that decoded them.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_choice,
    check_constants,
    check_like,
    check_pair,
    check_pixels,
    check_rank,
    fail,
    is_float,
    is_readable,
)
from ..registration import define

__all__ = ["random_resized_crop"]

FILTERS = ("bilinear", "bicubic")
# Of a JPEG file; a typing error asks for more.
MAX_SIDE = 65535


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
    """Resize each image's box to ``size``, then flip and normalize it.

    For uint8 images the same as Pillow's ``image.resize((w, h), filter, box=(left, top, left + width, top + height))``,
    which rounds to whole levels after the pass along the rows and again after that along the columns: at most one level
    apart, where Pillow's fixed-point weights round to the other side. Float images are not rounded. Enlarged boxes are
    interpolated, shrunk ones averaged (the filter widens with the ratio); pixels next to the box take part, as in Pillow.
    In plain torch: ``round(down @ round(x @ across.T))`` with the filter's weights as matrices. Not differentiable.

    Args:
        images: (B, C, H, W) uint8, or floats in 0..1; any strides.
        boxes: (B, 4) int64 or float: (left, top, width, height) in pixels, inside the image (checked on the CPU only).
        size: (h, w) of the result in pixels.
        interpolation: "bicubic" (a = -0.5) or "bilinear".
        flip: (B,) bool, True = mirror the result left-right; None = no flip.
        mean, std: C floats each in 0..1 units, or None for no normalization.
        dtype: uint8 for the levels themselves (uint8 images without mean and std), else a floating dtype, in 0..1 before
            normalization.

    Returns: (B, C, h, w) of ``dtype``.
    Raises: ValueError or TypeError for arguments that do not fit each other.
    Source: Pillow src/libImaging/Resample.c (``precompute_coeffs``) for the weights; torchvision RandomResizedCrop for
        the op; MAE, arXiv 2111.06377, appendix A.1, for bicubic.
    """
    check_rank("images", images, "(B, C, H, W)")
    check_pixels(images)
    batch, channels, height, width = images.shape
    check_rank("boxes", boxes, "(B, 4)")
    if boxes.dtype != torch.int64 and not is_float(boxes):
        raise fail("boxes", "int64 or floats", boxes.dtype, "convert them", TypeError)
    check_like("boxes", boxes, (batch, 4), boxes.dtype, images.device)
    if is_readable(boxes) and batch:
        left, top, w, h = boxes.double().unbind(1)
        ends = torch.stack([left + w - width, top + h - height])
        if not (min(left.min(), top.min()) >= 0 and min(w.min(), h.min()) > 0 and ends.max() <= 0):
            expected = f"(left, top, width, height) inside the {height}x{width} images, not empty"
            raise fail("boxes", expected, boxes.tolist() if batch < 3 else "others", "cut them to the image")
    size = check_pair("size", size)
    if min(size) < 1 or min(height, width) < 1 or max(size) > MAX_SIDE:
        raise fail("size", f"sides of 1..{MAX_SIDE} pixels", f"{tuple(size)} of {height}x{width}", "correct size")
    check_choice("interpolation", interpolation, FILTERS)
    if flip is not None:
        check_like("flip", flip, (batch,), torch.bool, images.device)
    check_constants(mean, std, channels)
    is_level = dtype is torch.uint8 and images.dtype == torch.uint8 and mean is None
    if isinstance(dtype, Tensor) or not (is_level or is_float(dtype)):
        expected = "a floating dtype, or uint8 for uint8 images without mean and std"
        raise fail("dtype", expected, dtype, "use torch.float32 or torch.bfloat16", TypeError)
    if dispatch.uses_reference("resize", images.device, images, dtype):
        return dispatch.reference("resize").random_resized_crop(
            images, boxes, size, interpolation=interpolation, flip=flip, mean=mean, std=std, dtype=dtype
        )
    return RESIZE(images.detach(), boxes, size, interpolation == "bicubic", flip, mean, std, dtype)


def allocate(images, boxes, size, is_bicubic, flip, mean, std, dtype) -> Tensor:
    return images.new_empty((*images.shape[:2], *size), dtype=dtype)


RESIZE = define(
    "resize",
    "random_resized_crop(Tensor images, Tensor boxes, SymInt[] size, bool is_bicubic, Tensor? flip, float[]? mean,"
    " float[]? std, ScalarType dtype) -> Tensor",
    allocate,
)
