"""Views in Triton: two passes over the pixels for views without blur, four with it, whatever each image asks for.

Which steps an image takes is decided on the device, so that nothing waits for the host: every program reads its image's
amounts and branches. Contrast needs the mean of the image as it is just before, so a first pass adds that up, with the
steps before contrast done anew in registers. Blurred images pass through a float32 copy, once per direction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from ..tuning import tuned
from . import allocate

# What is absent is decided when a kernel is compiled, what an image asks for when it runs: not one condition.
# ruff: noqa: SIM102


@triton.jit
def luma(red, green, blue):
    return red * 0.2989 + green * 0.587 + blue * 0.114


@triton.jit
def clamp01(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def rotated_hue(red, green, blue, turns):
    """The reference's formula: HSV -> RGB without its six cases."""
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - low
    sextant = tl.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sextant = tl.where(value == red, green - blue, sextant)
    sextant = sextant / tl.maximum(chroma, 1e-12) + 6 * turns
    sextant -= 6 * tl.floor(sextant / 6)
    red = low + chroma * clamp01(tl.abs(sextant - 3) - 1)
    green = value - chroma * clamp01(tl.abs(sextant - 2) - 1)
    blue = value - chroma * clamp01(tl.abs(sextant - 4) - 1)
    return red, green, blue


@triton.jit
def load_pixels(
    images_ptr, offset_ptr, flip_ptr, image, channel, pixel, inside, w, width,
    stride_b, stride_c, stride_h, stride_w, LEVELS: tl.constexpr,
):  # fmt: skip
    """Pixels of the window in 0..1; pixel = row * w + column of the window."""
    row = (pixel // w).to(tl.int64)
    column = (pixel % w).to(tl.int64)
    if offset_ptr is not None:
        row += tl.load(offset_ptr + 2 * image)
        column += tl.load(offset_ptr + 2 * image + 1)
    if flip_ptr is not None:
        column = tl.where(tl.load(flip_ptr + image), width - 1 - column, column)
    # By way of the image's number: a channel's own product would have 32 bits.
    source = images_ptr + image * stride_b + (image * 0 + channel) * stride_c + row * stride_h + column * stride_w
    x = tl.load(source, mask=inside, other=0).to(tl.float32)
    if LEVELS != 1:
        x = tl.div_rn(x, LEVELS)
    return x


@triton.jit
def load_colors(
    images_ptr, offset_ptr, flip_ptr, image, pixel, inside, w, width,
    stride_b, stride_c, stride_h, stride_w, LEVELS: tl.constexpr,
):  # fmt: skip
    """The three channels."""
    red = load_pixels(
        images_ptr, offset_ptr, flip_ptr, image, 0, pixel, inside, w, width,
        stride_b, stride_c, stride_h, stride_w, LEVELS,
    )  # fmt: skip
    green = load_pixels(
        images_ptr, offset_ptr, flip_ptr, image, 1, pixel, inside, w, width,
        stride_b, stride_c, stride_h, stride_w, LEVELS,
    )  # fmt: skip
    blue = load_pixels(
        images_ptr, offset_ptr, flip_ptr, image, 2, pixel, inside, w, width,
        stride_b, stride_c, stride_h, stride_w, LEVELS,
    )  # fmt: skip
    return red, green, blue


@triton.jit
def place_of_contrast(apply_ptr, order_ptr, image):
    """At which place of its order an image changes contrast; -1 without color changes."""
    place = -1
    if tl.load(apply_ptr + image):
        for i in tl.static_range(4):
            if tl.load(order_ptr + 4 * image + i) == 1:
                place = i
    return place


@triton.jit
def changed_colors(red, green, blue, amounts_ptr, order_ptr, image, batch, mean, last):
    """The color changes at places 0 .. last - 1 of the image's order; ``mean`` is what contrast blends with."""
    brightness, contrast = tl.load(amounts_ptr + image), tl.load(amounts_ptr + batch + image)
    saturation, turns = tl.load(amounts_ptr + 2 * batch + image), tl.load(amounts_ptr + 3 * batch + image)
    for i in tl.static_range(4):
        code = tl.load(order_ptr + 4 * image + i)
        if i < last:
            if code == 0:
                red, green, blue = clamp01(red * brightness), clamp01(green * brightness), clamp01(blue * brightness)
            elif code == 1:
                grey = mean * (1 - contrast)
                red, green, blue = (
                    clamp01(red * contrast + grey), clamp01(green * contrast + grey), clamp01(blue * contrast + grey)
                )  # fmt: skip
            elif code == 2:
                shade = luma(red, green, blue) * (1 - saturation)
                red, green, blue = (
                    clamp01(red * saturation + shade),
                    clamp01(green * saturation + shade),
                    clamp01(blue * saturation + shade),
                )
            else:
                red, green, blue = rotated_hue(red, green, blue, turns)
    return red, green, blue


@triton.jit
def changed_channel(x, amounts_ptr, order_ptr, image, batch, mean, last):
    """The same for one channel of an image that has no color: brightness and contrast."""
    brightness, contrast = tl.load(amounts_ptr + image), tl.load(amounts_ptr + batch + image)
    for i in tl.static_range(4):
        code = tl.load(order_ptr + 4 * image + i)
        if i < last:
            if code == 0:
                x = clamp01(x * brightness)
            elif code == 1:
                x = clamp01(x * contrast + mean * (1 - contrast))
    return x


@triton.jit
def mean_kernel(
    images_ptr, offset_ptr, flip_ptr, apply_ptr, order_ptr, amounts_ptr, sum_ptr, batch, h, w, width,
    stride_b, stride_c, stride_h, stride_w, LEVELS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (image, BLOCK pixels): the sum that the image's contrast needs the mean of; 0 if it needs none."""
    tiles = tl.cdiv(h * w, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = place_of_contrast(apply_ptr, order_ptr, image)
    total = 0.0
    if place >= 0:
        pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < h * w
        if C == 3:
            red, green, blue = load_colors(
                images_ptr, offset_ptr, flip_ptr, image, pixel, inside, w, width,
                stride_b, stride_c, stride_h, stride_w, LEVELS,
            )  # fmt: skip
            red, green, blue = changed_colors(red, green, blue, amounts_ptr, order_ptr, image, batch, 0.0, place)
            total = tl.sum(tl.where(inside, luma(red, green, blue), 0.0), 0)
        else:
            for channel in range(C):
                x = load_pixels(
                    images_ptr, offset_ptr, flip_ptr, image, channel, pixel, inside, w, width,
                    stride_b, stride_c, stride_h, stride_w, LEVELS,
                )  # fmt: skip
                x = changed_channel(x, amounts_ptr, order_ptr, image, batch, 0.0, place)
                total += tl.sum(tl.where(inside, x, 0.0), 0)
    tl.store(sum_ptr + tl.program_id(0), total)


@triton.jit
def store_pixels(
    out_ptr, copy_ptr, x, image, channel, pixel, inside, is_blurred, area,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, NORMALIZE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A finished channel of a view, or of the copy that is to be blurred."""
    target = (image * C + channel) * area + pixel
    if copy_ptr is not None:
        tl.store(copy_ptr + target, x, mask=inside & is_blurred)
    if NORMALIZE:
        x = (x - SHIFT) * SCALE
    tl.store(out_ptr + target, x.to(out_ptr.dtype.element_ty), mask=inside & ~is_blurred)


@triton.jit
def color_kernel(
    images_ptr, offset_ptr, flip_ptr, apply_ptr, order_ptr, amounts_ptr, sum_ptr, grey_ptr, sigma_ptr,
    copy_ptr, out_ptr, batch, h, w, width, stride_b, stride_c, stride_h, stride_w,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program = (image, BLOCK pixels): all steps before the blur; views without blur are finished."""
    tiles = tl.cdiv(h * w, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    is_blurred = image < 0
    if sigma_ptr is not None:
        is_blurred = tl.load(sigma_ptr + image) > 0
    is_changed = image < 0
    mean = 0.0
    if apply_ptr is not None:
        is_changed = tl.load(apply_ptr + image) != 0
        parts = tl.arange(0, TILES)
        mean = tl.sum(tl.load(sum_ptr + image * tiles + parts, mask=parts < tiles, other=0), 0)
        mean /= h * w if C == 3 else h * w * C
    if C == 3:
        red, green, blue = load_colors(
            images_ptr, offset_ptr, flip_ptr, image, pixel, inside, w, width,
            stride_b, stride_c, stride_h, stride_w, LEVELS,
        )  # fmt: skip
        if apply_ptr is not None:
            if is_changed:
                red, green, blue = changed_colors(red, green, blue, amounts_ptr, order_ptr, image, batch, mean, 4)
        if grey_ptr is not None:
            if tl.load(grey_ptr + image):
                red = luma(red, green, blue)
                green, blue = red, red
        store_pixels(
            out_ptr, copy_ptr, red, image, 0, pixel, inside, is_blurred, h * w, SHIFT[0], SCALE[0], NORMALIZE, C
        )
        store_pixels(
            out_ptr, copy_ptr, green, image, 1, pixel, inside, is_blurred, h * w, SHIFT[1], SCALE[1], NORMALIZE, C
        )
        store_pixels(
            out_ptr, copy_ptr, blue, image, 2, pixel, inside, is_blurred, h * w, SHIFT[2], SCALE[2], NORMALIZE, C
        )
    else:
        for channel in tl.static_range(C):
            x = load_pixels(
                images_ptr, offset_ptr, flip_ptr, image, channel, pixel, inside, w, width,
                stride_b, stride_c, stride_h, stride_w, LEVELS,
            )  # fmt: skip
            if apply_ptr is not None:
                if is_changed:
                    x = changed_channel(x, amounts_ptr, order_ptr, image, batch, mean, 4)
            store_pixels(
                out_ptr, copy_ptr, x, image, channel, pixel, inside, is_blurred, h * w,
                SHIFT[channel], SCALE[channel], NORMALIZE, C,
            )  # fmt: skip


@triton.jit
def tap(in_ptr, plane, row, column, distance, inside, h, w, sigma, ALONG_ROWS: tl.constexpr):
    """(weight, weight times pixel) of the pixels at a distance; at the edge, of the last one."""
    weight = tl.exp(-(distance * distance) / (2 * sigma * sigma))
    if ALONG_ROWS:
        source = row * w + tl.minimum(tl.maximum(column + distance, 0), w - 1)
    else:
        source = tl.minimum(tl.maximum(row + distance, 0), h - 1) * w + column
    return weight, weight * tl.load(in_ptr + plane * (h * w) + source, mask=inside, other=0)


@triton.jit
def blur_kernel(
    sigma_ptr, in_ptr, out_ptr, h, w, SHIFT: tl.constexpr, SCALE: tl.constexpr, NORMALIZE: tl.constexpr,
    C: tl.constexpr, RADIUS: tl.constexpr, ALONG_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (image, channel, BLOCK pixels): one direction of the blur, the second one finishes the view."""
    tiles = tl.cdiv(h * w, BLOCK)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    sigma = tl.load(sigma_ptr + plane // C).to(tl.float32)
    if sigma > 0:
        pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < h * w
        row, column = pixel // w, pixel % w
        blurred = tl.zeros([BLOCK], tl.float32)
        weights = 0.0
        # Written out where that is short: a wide blur would take minutes to compile.
        if RADIUS <= 16:
            for distance in tl.static_range(-RADIUS, RADIUS + 1):
                weight, part = tap(in_ptr, plane, row, column, distance, inside, h, w, sigma, ALONG_ROWS)
                blurred += part
                weights += weight
        else:
            for distance in range(-RADIUS, RADIUS + 1):
                weight, part = tap(in_ptr, plane, row, column, distance, inside, h, w, sigma, ALONG_ROWS)
                blurred += part
                weights += weight
        blurred /= weights
        if NORMALIZE:
            channel = plane % C
            for i in tl.static_range(C):
                if channel == i:
                    blurred = (blurred - SHIFT[i]) * SCALE[i]
        tl.store(out_ptr + plane * (h * w) + pixel, blurred.to(out_ptr.dtype.element_ty), mask=inside)


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
    (h, w), (batch, channels, _, width) = size, images.shape
    out = allocate(images, size, dtype)
    if out.numel() == 0:
        return out
    block = tuned("views")["BLOCK"]
    tiles = cdiv(h * w, block)
    levels = 255.0 if images.dtype == torch.uint8 else 1.0
    constants = {
        "SHIFT": (0.0,) * channels if mean is None else tuple(mean),
        "SCALE": (1.0,) * channels if std is None else tuple(1 / s for s in std),
        "NORMALIZE": mean is not None,
        "C": channels,
        "BLOCK": block,
        "num_warps": 4,
    }
    small = (offset, flip, apply, order, grey, blur_sigma)
    offset, flip, apply, order, grey, blur_sigma = (None if t is None else t.contiguous() for t in small)
    window = (images, offset, flip)
    sums = copy = None
    if amounts is not None:
        sums = images.new_empty((batch, tiles), dtype=torch.float32)
        mean_kernel[(batch * tiles,)](
            *window, apply, order, amounts, sums, batch, h, w, width, *images.stride(),
            LEVELS=levels, C=channels, BLOCK=block, num_warps=4,
        )  # fmt: skip
    if blur_sigma is not None:
        copy = images.new_empty((2, *out.shape), dtype=torch.float32)
    color_kernel[(batch * tiles,)](
        *window, apply, order, amounts, sums, grey, blur_sigma, None if copy is None else copy[0], out,
        batch, h, w, width, *images.stride(), LEVELS=levels, TILES=1 << (tiles - 1).bit_length(), **constants,
    )  # fmt: skip
    if copy is not None:
        grid = (batch * channels * tiles,)
        plain = {**constants, "NORMALIZE": False}
        blur_kernel[grid](blur_sigma, copy[0], copy[1], h, w, RADIUS=radius, ALONG_ROWS=True, **plain)
        blur_kernel[grid](blur_sigma, copy[1], out, h, w, RADIUS=radius, ALONG_ROWS=False, **constants)
    return out
