"""Masks in Triton without a sort: the place of a patch in the drawn order is the number of keys below its own.

Keys are (random word, index) and unique, so places are a permutation, and every output entry is written exactly once.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from ..philox import Stream
from ..philox.kernel import sample_words
from . import allocate

# Patches per program, and keys that are compared with at a time.
BLOCK, KEYS = 64, 64


@triton.jit
def word_of(rng_ptr, sample, index, STREAM: tl.constexpr):
    """Random word number ``index`` of the sample, uint32."""
    w0, w1, w2, w3 = sample_words(rng_ptr, sample, (index // 4).to(tl.uint32), STREAM)
    part = index % 4
    return tl.where(part < 2, tl.where(part == 0, w0, w1), tl.where(part == 2, w2, w3))


@triton.jit
def drawn_place(rng_ptr, sample, index, count, STREAM: tl.constexpr, KEYS: tl.constexpr):
    """Place of each of the indices [n] in the drawn order of 0..count-1."""
    own = word_of(rng_ptr, sample, index, STREAM)[:, None]
    place = index * 0
    for start in range(0, count, KEYS):
        other = start + tl.arange(0, KEYS)
        word = word_of(rng_ptr, sample, other, STREAM)[None, :]
        is_below = (word < own) | ((word == own) & (other[None, :] < index[:, None]))
        place += tl.sum((is_below & (other[None, :] < count)).to(tl.int32), 1)
    return place


@triton.jit
def mask_kernel(
    rng_ptr, ids_ptr, keep_ptr, masked_ptr, restore_ptr, mask_ptr, rows, columns, num_keep,
    CELL: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program = (image, BLOCK patches of its rows x columns grid); cells of CELL x CELL patches share a key."""
    length = rows * columns
    tiles = tl.cdiv(length, BLOCK)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    patch = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    row, column = patch // columns, patch % columns
    cell = row // CELL * (columns // CELL) + column // CELL
    place = drawn_place(rng_ptr, tl.load(ids_ptr + image), cell, length // (CELL * CELL), STREAM, KEYS)
    place = place * (CELL * CELL) + row % CELL * CELL + column % CELL

    exists = patch < length
    is_masked = place >= num_keep
    tl.store(restore_ptr + image * length + patch, place.to(tl.int64), mask=exists)
    tl.store(mask_ptr + image * length + patch, is_masked.to(tl.float32), mask=exists)
    value = patch.to(tl.int64)
    tl.store(keep_ptr + image * num_keep + place, value, mask=exists & ~is_masked)
    tl.store(masked_ptr + image * (length - num_keep) + place - num_keep, value, mask=exists & is_masked)


def draw_masks(rng: Tensor, ids: Tensor, rows: int, columns: int, cell: int, keep: int) -> tuple[Tensor, ...]:
    out = allocate(rng, ids, rows, columns, cell, keep)
    if ids.shape[0]:
        keys = min(KEYS, next_power_of_2(rows * columns // (cell * cell)))
        mask_kernel[(ids.shape[0] * cdiv(rows * columns, BLOCK),)](
            rng.contiguous(), ids.contiguous(), *out, rows, columns, keep * cell * cell,
            CELL=cell, STREAM=int(Stream.MASK), BLOCK=BLOCK, KEYS=keys, num_warps=4,
        )  # fmt: skip
    return out
