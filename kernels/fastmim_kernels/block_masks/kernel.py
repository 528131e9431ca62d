"""Block masks in Triton: one program per image draws all its rectangles, with the mask in registers.

The reference's rounds as they are: the tries of a round see the same mask, and the first that fits is taken.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import next_power_of_2
from ..masks.kernel import word_of
from ..philox import Stream
from . import allocate, reference


@triton.jit
def rounded(x):
    """To the nearest integer, half to even, as torch.round; x >= 0, int32."""
    nearest = tl.floor(x + 0.5)
    is_odd_tie = (nearest == x + 0.5) & (nearest - 2 * tl.floor(nearest / 2) == 1)
    return tl.where(is_odd_tie, nearest - 1, nearest).to(tl.int32)


@triton.jit
def chosen(values, is_chosen):
    """The value at the one place where is_chosen, 0 if there is none."""
    return tl.sum(tl.where(is_chosen, values, 0), 0)


@triton.jit
def masked_at(mask_ptr, row, column, rows, columns):
    """1 where a patch of the stored mask is masked; 0 outside of the grid."""
    exists = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return tl.load(mask_ptr + row * columns + column, mask=exists, other=0).to(tl.int32)


@triton.jit
def block_mask_kernel(
    rng_ptr, ids_ptr, bounds_ptr, keep_ptr, masked_ptr, restore_ptr, mask_ptr, score_ptr, rows, columns, num_masked,
    min_block, STREAM: tl.constexpr, ROUNDS: tl.constexpr, TRIES: tl.constexpr, WORDS: tl.constexpr,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Program = image. bounds_ptr -> logarithms of the lowest and highest aspect, float64."""
    image = tl.program_id(0).to(tl.int64)
    sample = tl.load(ids_ptr + image)
    low, high = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    length = rows * columns
    patch = tl.arange(0, BLOCK)
    exists = patch < length
    row, column = patch // columns, patch % columns
    is_masked = patch < 0
    missing = num_masked + tl.zeros([], tl.int32)
    attempt = tl.arange(0, TRIES)
    for i in range(ROUNDS):
        if missing > 0:
            index = (i * TRIES + attempt) * WORDS
            shape = word_of(rng_ptr, sample, index, STREAM)
            place = word_of(rng_ptr, sample, index + 1, STREAM)
            # float64, as the reference: which integer a side is rounded to must not depend on the device.
            area_draw = (shape >> 16).to(tl.float64) * (1.0 / (1 << 16))
            ratio = tl.exp(low + (high - low) * ((shape & 0xFFFF).to(tl.float64) * (1.0 / (1 << 16))))
            area = min_block + (missing - min_block).to(tl.float64) * area_draw
            h, w = rounded(tl.sqrt(area * ratio)), rounded(tl.sqrt(area / ratio))
            fits = (h < rows) & (w < columns)
            top = ((place >> 16).to(tl.int32) * tl.where(fits, rows - h + 1, 0)) >> 16
            left = ((place & 0xFFFF).to(tl.int32) * tl.where(fits, columns - w + 1, 0)) >> 16
            inside = (row >= top[:, None]) & (row < (top + h)[:, None]) & exists
            inside = inside & (column >= left[:, None]) & (column < (left + w)[:, None])
            added = tl.sum((inside & (is_masked == 0)).to(tl.int32), 1)
            accepted = fits & (added > 0) & (added <= missing)
            first = tl.min(tl.where(accepted, attempt, TRIES), 0)
            is_first = attempt == first
            top, left = chosen(top, is_first), chosen(left, is_first)
            bottom, right = top + chosen(h, is_first), left + chosen(w, is_first)
            is_masked = is_masked | ((row >= top) & (row < bottom) & (column >= left) & (column < right))
            missing -= chosen(added, is_first)

    mask_ptr += image * length
    if missing > 0:
        # The patches with the most masked neighbors, ties in raster order from a random patch on.
        tl.store(mask_ptr + patch, is_masked.to(tl.float32), mask=exists)
        tl.debug_barrier()
        neighbors = masked_at(mask_ptr, row - 1, column, rows, columns) + masked_at(
            mask_ptr, row + 1, column, rows, columns
        )
        neighbors += masked_at(mask_ptr, row, column - 1, rows, columns) + masked_at(
            mask_ptr, row, column + 1, rows, columns
        )
        start = (word_of(rng_ptr, sample, patch * 0, STREAM) % length.to(tl.uint32)).to(tl.int32)
        later = (patch + length - start) % length
        score = tl.where(is_masked, -1, neighbors * length + length - 1 - later)
        score_ptr += image * length
        tl.store(score_ptr + patch, score, mask=exists)
        tl.debug_barrier()
        better = patch * 0
        for begin in range(0, length, OTHERS):
            other = begin + tl.arange(0, OTHERS)
            theirs = tl.load(score_ptr + other, mask=other < length, other=-1)
            better += tl.sum((theirs[None, :] > score[:, None]).to(tl.int32), 1)
        is_masked = is_masked | (better < missing)
        tl.debug_barrier()

    # Visible patches first, each kind in raster order.
    is_masked = is_masked & exists
    hidden = is_masked.to(tl.int32)
    before = tl.cumsum(hidden, 0) - hidden
    num_keep = length - num_masked
    place = tl.where(is_masked, num_keep + before, patch - before)
    tl.store(restore_ptr + image * length + patch, place.to(tl.int64), mask=exists)
    tl.store(mask_ptr + patch, hidden.to(tl.float32), mask=exists)
    tl.store(keep_ptr + image * num_keep + place, patch.to(tl.int64), mask=exists & (is_masked == 0))
    tl.store(masked_ptr + image * num_masked + before, patch.to(tl.int64), mask=is_masked)


def block_masking(
    rng: Tensor, ids: Tensor, rows: int, columns: int, num_masked: int, min_block: int, low: float, high: float
) -> tuple[Tensor, ...]:
    out = allocate(rng, ids, rows, columns, num_masked, min_block, low, high)
    if ids.shape[0]:
        length = rows * columns
        block = max(16, next_power_of_2(length))
        # As fills: a CUDA graph cannot capture a copy from the host.
        bounds = torch.cat([torch.full((1,), x, dtype=torch.float64, device=ids.device) for x in (low, high)])
        score = ids.new_empty((ids.shape[0], length), dtype=torch.int32)
        block_mask_kernel[(ids.shape[0],)](
            rng.contiguous(), ids.contiguous(), bounds, *out, score, rows, columns, num_masked, min_block,
            STREAM=int(Stream.BLOCK), ROUNDS=reference.ROUNDS, TRIES=reference.TRIES, WORDS=reference.WORDS,
            BLOCK=block, OTHERS=16, num_warps=max(1, min(8, block // 64)),
        )  # fmt: skip
    return out
