"""Views in C++, one image after the other in a scratch image that stays in the cache."""

import torch
from torch import Tensor

from .. import native_library
from ..patches.native import images_shape
from . import allocate

_shift_flip_jitter = native_library.function("shift_flip_jitter")


def shift_flip_jitter(
    images: Tensor,
    size: list[int],
    offset: Tensor | None,
    flip: Tensor | None,
    apply: Tensor | None,
    order: Tensor | None,
    amounts: Tensor | None,
    grey: Tensor | None,
    blur_sigma: Tensor | None,
    radius: int,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    out = allocate(images, size, dtype)
    small = (offset, flip, apply, order, amounts, grey, blur_sigma)
    offset, flip, apply, order, amounts, grey, blur_sigma = (None if t is None else t.contiguous() for t in small)
    shift = None if mean is None else native_library.floats(mean)
    scale = None if std is None else native_library.floats([1 / s for s in std])
    _shift_flip_jitter(
        images, images_shape(images, size), offset, flip, apply, order, amounts, grey, blur_sigma, radius, shift, scale,
        out, native_library.DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out
