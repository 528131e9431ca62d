"""Patch gather in C++: each wanted pixel is read once from the master image and written once."""

import ctypes

import torch
from torch import Tensor

from .. import native_library
from . import allocate

_patchify_gather = native_library.function("patchify_gather")


def images_shape(images: Tensor, size: list[int]) -> ctypes.Array:
    """What ``Images`` of kernels/csrc/images.h reads: dtype, sizes and strides of the images, size of the window."""
    return native_library.integers(native_library.DTYPES[images.dtype], *images.shape, *images.stride(), *size)


def levels(
    images: Tensor, mean: list[float] | None, std: list[float] | None
) -> tuple[ctypes.Array, ctypes.Array] | tuple[None, None]:
    """Shift and scale per channel for pixels as stored; both None: scale to 0..1 only."""
    if mean is None:
        return None, None
    top = 255.0 if images.dtype == torch.uint8 else 1.0
    return native_library.floats([m * top for m in mean]), native_library.floats([1 / (s * top) for s in std])


def contiguous(*small: Tensor | None) -> list[Tensor | None]:
    """Ids, offsets and flags in the layout that the kernels read; images and tokens keep their strides."""
    return [None if t is None else t.contiguous() for t in small]


def patchify_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    mean: list[float] | None,
    std: list[float] | None,
    size: list[int],
    offset: Tensor | None,
    flip: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out = allocate(images, ids, patch_size, mean, std, size, offset, flip, dtype)
    offset, flip, ids = contiguous(offset, flip, ids)
    _patchify_gather(
        images, images_shape(images, size), offset, flip, ids, out.shape[1], patch_size, *levels(images, mean, std),
        out, native_library.DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
