"""Mixing and unmixing in Triton: each pixel and token is read once and written once.

Backward of unmixing: one pass over the gradient; sums over images are made in two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2, row_config
from ..masks.kernel import BLOCK, KEYS, drawn_place
from ..patches.kernel import (
    channel_constants,
    contiguous,
    normalized,
    patch_offsets,
    patch_origin,
    pixel_constants,
    window_of,
)
from ..philox import Stream
from ..restore.kernel import chunk_size
from ..tuning import tuned
from . import allocate_mix, allocate_partition, allocate_unmix, allocate_unmix_backward


@triton.jit
def partition_kernel(
    rng_ptr, ids_ptr, out_ptr, length, members, STREAM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Program = (mixture, BLOCK positions)."""
    tiles = tl.cdiv(length, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    place = drawn_place(rng_ptr, tl.load(ids_ptr + group), position, length, STREAM, KEYS)
    tl.store(out_ptr + group * length + position, (place % members).to(tl.int64), mask=position < length)


@triton.jit
def mix_kernel(
    images_ptr, src_ptr, offset_ptr, flip_ptr, out_ptr, members, length, columns, width,
    stride_b, stride_c, stride_h, stride_w,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, LEVELS: tl.constexpr, NORMALIZE: tl.constexpr, WIDE: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (mixture, PATCHES of its patches); as patchify_kernel, but each patch has its own image."""
    tiles = tl.cdiv(length, PATCHES)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    patch = tl.program_id(0) % tiles * PATCHES + tl.arange(0, PATCHES)
    image = group * members + tl.load(src_ptr + group * length + patch, mask=patch < length, other=0)
    top, left, is_flipped = window_of(offset_ptr, flip_ptr, image)
    origin = image * stride_b + patch_origin(top, left, is_flipped, patch, columns, width, stride_h, stride_w, P)
    channel, offsets = patch_offsets(is_flipped[:, None], stride_c, stride_h, stride_w, P, C, BLOCK, WIDE)
    index = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    inside = (patch < length)[:, None] & (index < P * P * C)[None, :]
    values = tl.load(images_ptr + origin[:, None] + offsets, mask=inside, other=0)
    shift, scale = channel_constants(channel, SHIFT, SCALE, C)
    values = normalized(values, shift[None, :], scale[None, :], LEVELS, NORMALIZE)
    target = out_ptr + (group * length + patch)[:, None] * (P * P * C) + index[None, :]
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def unmix_kernel(
    tokens_ptr, mask_token_ptr, pos_ptr, src_ptr, out_ptr, members, total, prefix, width,
    stride_g, stride_n, stride_d, stride_pos, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (mixture, ROWS of its rows, block of columns); writes those rows of all members."""
    tiles = tl.cdiv(total, ROWS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < width)[None, :]
    is_patch = (rows >= prefix) & (rows < total)
    src = tl.load(src_ptr + group * (total - prefix) + rows - prefix, mask=is_patch, other=0)
    source = tokens_ptr + group * stride_g + rows.to(tl.int64)[:, None] * stride_n
    token = tl.load(source + columns.to(tl.int64)[None, :] * stride_d, mask=inside, other=0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + columns, mask=columns < width, other=0).to(tl.float32)
    pos = tl.load(pos_ptr + rows[:, None] * stride_pos + columns[None, :], mask=inside, other=0).to(tl.float32)
    own = (token + pos).to(out_ptr.dtype.element_ty)
    masked = (mask_token[None, :] + pos).to(out_ptr.dtype.element_ty)
    target = out_ptr + (group * members * total + rows)[:, None] * width + columns[None, :]
    for member in range(members):
        is_own = (src == member) | (rows < prefix)
        tl.store(target, tl.where(is_own[:, None], own, masked), mask=inside)
        target += total * width


@triton.jit
def unmix_backward_kernel(
    grad_ptr, src_ptr, tokens_grad_ptr, mask_sum_ptr, pos_sum_ptr, groups, members, total, prefix, width,
    stride_b, stride_n, stride_d,
    CHUNK: tl.constexpr, MEMBERS: tl.constexpr, BLOCK: tl.constexpr, WITH_POS: tl.constexpr,
):  # fmt: skip
    """Program = (row, CHUNK mixtures, block of columns)."""
    row = tl.program_id(0) % total
    chunk = tl.program_id(0) // total
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    is_patch = row >= prefix
    mask_sum = tl.zeros([MEMBERS, BLOCK], tl.float32)
    pos_sum = tl.zeros([MEMBERS, BLOCK], tl.float32)
    start = (chunk * CHUNK).to(tl.int64)
    for i in range(0, tl.minimum(CHUNK, groups - chunk * CHUNK)):
        group = start + i
        src = tl.load(src_ptr + group * (total - prefix) + row - prefix, mask=is_patch, other=0)
        token_grad = tl.zeros([MEMBERS, BLOCK], tl.float32)
        for first in range(0, members, MEMBERS):
            member = first + tl.arange(0, MEMBERS)
            image = group * members + member
            source = grad_ptr + image[:, None] * stride_b + row.to(tl.int64) * stride_n
            grad = tl.load(
                source + columns.to(tl.int64)[None, :] * stride_d,
                mask=(member < members)[:, None] & inside[None, :],
                other=0,
            ).to(tl.float32)
            is_own = ((member == src) | (row < prefix))[:, None]
            token_grad += tl.where(is_own, grad, 0.0)
            mask_sum += tl.where(is_own, 0.0, grad)
            if WITH_POS:
                pos_sum += grad
        if tokens_grad_ptr is not None:
            target = tokens_grad_ptr + (group * total + row) * width + columns
            tl.store(target, tl.sum(token_grad, 0).to(tokens_grad_ptr.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(mask_sum_ptr + partial, tl.sum(mask_sum, 0), mask=inside)
    if WITH_POS:
        tl.store(pos_sum_ptr + partial, tl.sum(pos_sum, 0), mask=inside)


def partition(rng: Tensor, ids: Tensor, num_patches: int, members: int) -> Tensor:
    out = allocate_partition(rng, ids, num_patches, members)
    if out.numel():
        partition_kernel[(ids.shape[0] * cdiv(num_patches, BLOCK),)](
            rng.contiguous(), ids.contiguous(), out, num_patches, members,
            STREAM=int(Stream.MIX), BLOCK=BLOCK, KEYS=min(KEYS, next_power_of_2(num_patches)), num_warps=4,
        )  # fmt: skip
    return out


def mix_patches(
    images, src, patch_size: int, members: int, mean, std, size: list[int], offset, flip, dtype: torch.dtype
) -> Tensor:
    out = allocate_mix(images, src, patch_size, members, mean, std, size, offset, flip, dtype)
    if out.numel():
        groups, length, _ = out.shape
        constants = pixel_constants(images, patch_size, mean, std)
        mix_kernel[(groups * cdiv(length, constants["PATCHES"]),)](
            images, src.contiguous(), contiguous(offset), contiguous(flip), out,
            members, length, size[1] // patch_size, images.shape[3], *images.stride(),
            **constants,
        )  # fmt: skip
    return out


def unmix_tokens(tokens, mask_token, position, src, members: int, num_prefix: int) -> Tensor:
    out = allocate_unmix(tokens, mask_token, position, src, members, num_prefix)
    if out.numel():
        groups, total, width = tokens.shape
        rows = tuned("mixing")["ROWS"]
        config = row_config(width, out.element_size() * rows)
        position = position if position.stride(1) == 1 else position.contiguous()
        unmix_kernel[(groups * cdiv(total, rows), cdiv(width, config["BLOCK"]))](
            tokens, mask_token.contiguous(), position, src.contiguous(), out,
            members, total, num_prefix, width, *tokens.stride(), position.stride(0), ROWS=rows, **config,
        )  # fmt: skip
    return out


def unmix_tokens_backward(
    grad: Tensor, src: Tensor, members: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    (groups, _), (_, total, width) = src.shape, grad.shape
    tokens_grad, mask_grad, pos_grad = allocate_unmix_backward(grad, src, members, num_prefix, dtype, wanted)
    chunk = max(1, chunk_size(groups * members) // members)
    chunks = cdiv(groups, chunk)
    mask_sum = grad.new_empty((chunks, total, width), dtype=torch.float32)
    pos_sum = grad.new_empty((chunks if wanted[2] else 0, total, width), dtype=torch.float32)
    if grad.numel():
        at_once = tuned("mixing")["MEMBERS"]
        config = row_config(width, grad.element_size() * at_once)
        unmix_backward_kernel[(chunks * total, cdiv(width, config["BLOCK"]))](
            grad, src.contiguous(), tokens_grad if wanted[0] else None, mask_sum, pos_sum,
            groups, members, total, num_prefix, width, *grad.stride(),
            CHUNK=chunk, MEMBERS=at_once, WITH_POS=wanted[2], **config,
        )  # fmt: skip
    if wanted[1]:
        torch.sum(mask_sum, (0, 1), out=mask_grad)
    if wanted[2]:
        torch.sum(pos_sum, 0, out=pos_grad)
    return tokens_grad, mask_grad, pos_grad
