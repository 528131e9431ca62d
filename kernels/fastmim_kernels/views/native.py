"""Views in C++, one image after the other in a scratch image that stays in the cache."""

import math

import torch
from torch import Tensor

from .. import native_library
from ..patches.native import images_shape
from ..registration import define
from . import ColorJitter, reference

_shift_flip_jitter = native_library.function("shift_flip_jitter")


def _compute(
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
    out = images.new_empty((*images.shape[:2], *size), dtype=dtype)
    small = (offset, flip, apply, order, amounts, grey, blur_sigma)
    offset, flip, apply, order, amounts, grey, blur_sigma = (None if t is None else t.contiguous() for t in small)
    shift = None if mean is None else native_library.floats(mean)
    scale = None if std is None else native_library.floats([1 / s for s in std])
    _shift_flip_jitter(
        images, images_shape(images, size), offset, flip, apply, order, amounts, grey, blur_sigma, radius, shift, scale,
        out, native_library.DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake(images, size, *arguments):
    return images.new_empty((*images.shape[:2], *size), dtype=arguments[-1])


_op = define(
    "native_shift_flip_jitter(Tensor images, SymInt[] size, Tensor? offset, Tensor? flip, Tensor? apply, Tensor? order,"
    " Tensor? amounts, Tensor? grey, Tensor? blur_sigma, int radius, float[]? mean, float[]? std, ScalarType dtype)"
    " -> Tensor",
    _compute,
    _fake,
)


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
    """See the public function. float64 images or results are left to the reference."""
    if dtype not in native_library.FLOATS or images.dtype not in native_library.DTYPES:
        return reference.shift_flip_jitter(
            images, size=size, offset=offset, flip=flip, jitter=jitter, grey=grey, blur_sigma=blur_sigma,
            max_blur_sigma=max_blur_sigma, mean=mean, std=std, dtype=dtype,
        )  # fmt: skip
    apply, order, *amounts = (None, None) if jitter is None else jitter
    return _op(
        images.detach(),
        size,
        offset,
        flip,
        apply,
        order,
        torch.stack([a.float() for a in amounts]) if amounts else None,
        grey,
        None if blur_sigma is None else blur_sigma.float(),
        math.ceil(3 * max_blur_sigma),
        mean,
        std,
        dtype,
    )
