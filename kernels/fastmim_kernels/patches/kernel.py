"""Patch gather in Triton: window, flip, normalization and patch order in the addresses of one pass over the pixels.

The device functions also serve the kernels that read patches for a loss or a mixture.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from ..tuning import tuned
from . import allocate


@triton.jit
def window_of(offset_ptr, flip_ptr, image):
    """(top, left, is flipped) of an image's window; without offset (0, 0), without flip False."""
    top = image * 0
    left = image * 0
    if offset_ptr is not None:
        top = tl.load(offset_ptr + 2 * image)
        left = tl.load(offset_ptr + 2 * image + 1)
    is_flipped = image < 0
    if flip_ptr is not None:
        is_flipped = tl.load(flip_ptr + image) != 0
    return top, left, is_flipped


@triton.jit
def patch_origin(top, left, is_flipped, patch, columns, width, stride_h, stride_w, P: tl.constexpr):
    """Address, relative to the image, of the patch's pixel with the lowest address."""
    # 64-bit division takes over 100 instructions.
    patch = patch.to(tl.int32)
    top += patch // columns * P
    left += patch % columns * P
    left = tl.where(is_flipped, width - P - left, left)
    return top * stride_h + left * stride_w


@triton.jit
def patch_offsets(
    is_flipped, stride_c, stride_h, stride_w, P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Channel of each value of a patch row, and its address relative to ``patch_origin``."""
    index = tl.arange(0, BLOCK)
    channel = index % C
    column = index // C % P
    column = tl.where(is_flipped, P - 1 - column, column)
    row = index // (P * C)
    if WIDE:
        return channel, channel.to(tl.int64) * stride_c + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    else:
        # Unsigned: the upper half of the address needs no register.
        return channel, (channel * stride_c + row * stride_h + column * stride_w).to(tl.uint32)


@triton.jit
def channel_constants(channel, SHIFT: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr):
    """Per value, what is subtracted from it and what the difference is multiplied by."""
    shift = channel * 0.0 + SHIFT[0]
    scale = channel * 0.0 + SCALE[0]
    for i in tl.static_range(1, C):
        shift = tl.where(channel == i, SHIFT[i], shift)
        scale = tl.where(channel == i, SCALE[i], scale)
    return shift, scale


@triton.jit
def normalized(values, shift, scale, LEVELS: tl.constexpr, NORMALIZE: tl.constexpr):
    """Pixels to float32, as the reference rounds them."""
    wide = values.to(tl.float32)
    if NORMALIZE:
        wide = (wide - shift) * scale
    elif LEVELS != 1:
        wide = tl.div_rn(wide, LEVELS)
    return wide


@triton.jit
def patchify_kernel(
    images_ptr, ids_ptr, offset_ptr, flip_ptr, out_ptr, keep, columns, width, stride_b, stride_c, stride_h, stride_w,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (image, PATCHES of its kept patches)."""
    tiles = tl.cdiv(keep, PATCHES)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * PATCHES
    top, left, is_flipped = window_of(offset_ptr, flip_ptr, image)
    channel, offsets = patch_offsets(is_flipped, stride_c, stride_h, stride_w, P, C, BLOCK, WIDE)
    place = first + tl.arange(0, PATCHES)
    patch = place
    if ids_ptr is not None:
        patch = tl.load(ids_ptr + image * keep + place, mask=place < keep, other=0)
    origin = patch_origin(top, left, is_flipped, patch, columns, width, stride_h, stride_w, P)
    # Hiding that values are contiguous makes consecutive threads take consecutive values: the pixels of a warp are then
    # in 3 to 5 cache lines. With 16-byte stores they would be in 16, and the cache looks up one line per cycle.
    index = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    inside = (place < keep)[:, None] & (index < P * P * C)[None, :]
    source = images_ptr + image * stride_b + origin[:, None]
    values = tl.load(source + offsets[None, :], mask=inside, other=0)
    shift, scale = channel_constants(channel, SHIFT, SCALE, C)
    values = normalized(values, shift[None, :], scale[None, :], LEVELS, NORMALIZE)
    target = out_ptr + (image * keep + place)[:, None] * (P * P * C) + index[None, :]
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)


def pixel_constants(
    images: Tensor, patch_size: int, mean: list[float] | None, std: list[float] | None
) -> dict[str, object]:
    """Constants and launch settings of a kernel that reads patches; pixels are normalized in units of their levels."""
    channels = images.shape[1]
    levels = 255.0 if images.dtype == torch.uint8 else 1.0
    block = next_power_of_2(patch_size * patch_size * channels)
    reach = (channels - 1) * images.stride(1) + (patch_size - 1) * (images.stride(2) + images.stride(3))
    return {
        "SHIFT": (0.0,) * channels if mean is None else tuple(m * levels for m in mean),
        "SCALE": (0.0,) * channels if std is None else tuple(1 / (s * levels) for s in std),
        "LEVELS": levels,
        "NORMALIZE": mean is not None,
        "WIDE": reach >= 1 << 31,
        "P": patch_size,
        "C": channels,
        # What depends on the image alone is shared by the patches of a program, and a thread of 16x16x3 patches has
        # 6 * PATCHES loads in flight, enough bytes under way to fill the memory's bandwidth.
        "PATCHES": tuned("patches")["PATCHES"],
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 256)),
    }


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


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
    if out.numel():
        batch, keep, _ = out.shape
        constants = pixel_constants(images, patch_size, mean, std)
        patchify_kernel[(batch * cdiv(keep, constants["PATCHES"]),)](
            images, contiguous(ids), contiguous(offset), contiguous(flip), out,
            keep, size[1] // patch_size, images.shape[3], *images.stride(), **constants,
        )  # fmt: skip
    return out
