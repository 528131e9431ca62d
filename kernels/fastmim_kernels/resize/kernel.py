"""Resized crops in Triton: one pass along the rows into a copy of the image's dtype, one along the columns, which also
flips and normalizes. Weights are made on the fly: a program's tile shares them over its other side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from ..tuning import tuned
from . import allocate


@triton.jit
def taps_of(boxes_ptr, image, axis, places, count, CUBIC: tl.constexpr):
    """(first pixel, its distance from the center, 1 / width of the filter, pixels under the filter) for each place."""
    start = tl.load(boxes_ptr + 4 * image + axis).to(tl.float64)
    length = tl.load(boxes_ptr + 4 * image + 2 + axis).to(tl.float64)
    ratio = length / count
    stretch = tl.maximum(ratio, 1.0)
    support = stretch * 2 if CUBIC else stretch
    center = start + (places.to(tl.float64) + 0.5) * ratio
    first = tl.ceil(center - support - 0.5)
    # A little room: the filter is 0 there.
    taps = (2 * support).to(tl.int32) + 2
    return first.to(tl.int32), (first + 0.5 - center).to(tl.float32), (1 / stretch).to(tl.float32), taps


@triton.jit
def filter_weight(distance, pixel, limit, CUBIC: tl.constexpr):
    """Weight of a pixel; 0 outside of the image."""
    x = tl.abs(distance)
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        weight = tl.maximum(1 - x, 0.0)
    return tl.where((pixel >= 0) & (pixel < limit), weight, 0.0)


@triton.jit
def level(x):
    """Rounded to a whole level, half up."""
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0)


@triton.jit
def along_rows_kernel(
    images_ptr, boxes_ptr, out_ptr, channels, height, width, w, stride_b, stride_c, stride_h, stride_w,
    CUBIC: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program = (image, channel, ROWS of its rows, COLUMNS of the w columns of the result)."""
    tiles = tl.cdiv(height, ROWS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    image, channel = plane // channels, plane % channels
    row = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, distance, narrow, taps = taps_of(boxes_ptr, image, 0, column, w, CUBIC)
    source = images_ptr + image * stride_b + channel * stride_c + row[:, None] * stride_h
    is_row = (row < height)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    weights = tl.zeros([COLUMNS], tl.float32)
    for tap in range(0, taps):
        pixel = first + tap
        weight = filter_weight((distance + tap) * narrow, pixel, width, CUBIC)
        is_pixel = (weight != 0)[None, :]
        value = tl.load(source + pixel.to(tl.int64)[None, :] * stride_w, mask=is_row & is_pixel, other=0)
        total += value.to(tl.float32) * weight[None, :]
        weights += weight
    total /= weights[None, :]
    if LEVELS:
        total = level(total)
    target = out_ptr + (plane * height + row)[:, None] * w + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=is_row & (column < w)[None, :])


@triton.jit
def along_columns_kernel(
    in_ptr, boxes_ptr, flip_ptr, out_ptr, channels, height, h, w,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, NORMALIZE: tl.constexpr, CUBIC: tl.constexpr, LEVELS: tl.constexpr,
    TO_LEVELS: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program = (image, channel, ROWS of the h rows of the result, COLUMNS of its columns)."""
    tiles = tl.cdiv(h, ROWS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    image, channel = plane // channels, plane % channels
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first, distance, narrow, taps = taps_of(boxes_ptr, image, 1, row, h, CUBIC)
    source = in_ptr + plane * height * w + column[None, :]
    is_column = (column < w)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    for tap in range(0, taps):
        pixel = first + tap
        weight = filter_weight((distance + tap) * narrow, pixel, height, CUBIC)
        is_pixel = (weight != 0)[:, None]
        value = tl.load(source + pixel.to(tl.int64)[:, None] * w, mask=is_column & is_pixel, other=0)
        total += value.to(tl.float32) * weight[:, None]
        weights += weight
    total /= weights[:, None]
    if LEVELS:
        total = level(total)
        if not TO_LEVELS:
            total = tl.div_rn(total, 255.0)
    if NORMALIZE:
        for i in tl.static_range(C):
            if channel == i:
                total = (total - SHIFT[i]) * SCALE[i]
    place = column
    if flip_ptr is not None:
        place = tl.where(tl.load(flip_ptr + image) != 0, w - 1 - column, column)
    target = out_ptr + (plane * h + row.to(tl.int64)[:, None]) * w + place[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=(row < h)[:, None] & is_column)


def random_resized_crop(
    images: Tensor,
    boxes: Tensor,
    size: list[int],
    is_bicubic: bool,
    flip: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    out = allocate(images, boxes, size, is_bicubic, flip, mean, std, dtype)
    (batch, channels, height, width), (h, w) = images.shape, size
    if not out.numel():
        return out
    boxes, flip = boxes.contiguous(), None if flip is None else flip.contiguous()
    is_level = images.dtype == torch.uint8
    # Float images are not rounded between the passes.
    between = images.new_empty((batch, channels, height, w), dtype=torch.uint8 if is_level else torch.float32)
    rows, columns = tuned("resize")["ROWS"], tuned("resize")["COLUMNS"]
    constants = {"CUBIC": is_bicubic, "LEVELS": is_level, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
    along_rows_kernel[(batch * channels * cdiv(height, rows), cdiv(w, columns))](
        images, boxes, between, channels, height, width, w, *images.stride(), **constants
    )
    along_columns_kernel[(batch * channels * cdiv(h, rows), cdiv(w, columns))](
        between, boxes, flip, out, channels, height, h, w,
        SHIFT=(0.0,) * channels if mean is None else tuple(mean),
        SCALE=(1.0,) * channels if std is None else tuple(1 / s for s in std),
        NORMALIZE=mean is not None, TO_LEVELS=dtype == torch.uint8, C=channels, **constants,
    )  # fmt: skip
    return out
