"""Philox4x32-10 in Triton: a device function for other kernels, and the draws themselves. Bit-equal to the reference.

Source: Salmon et al., SC 2011; constants from Random123 ``philox.h``.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from ..tuning import tuned
from . import allocate_uniform, allocate_words


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The bijection on uint32 counter words and key words: four random words per element."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def sample_words(rng_ptr, sample, block, STREAM: tl.constexpr):
    """Words 4 * block .. 4 * block + 3 of a sample: rng_ptr -> [seed, step], sample int64, block uint32."""
    seed, step = tl.load(rng_ptr), tl.load(rng_ptr + 1)
    zero = block * 0
    c3 = zero + ((sample >> 32) & 0xFFFF).to(tl.uint32) << 16 | STREAM
    k0, k1 = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    return philox4x32(block, zero + sample.to(tl.uint32), zero + step.to(tl.uint32), c3, k0, k1)


@triton.jit
def draw_kernel(rng_ptr, ids_ptr, out_ptr, count, STREAM: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr):
    """Program = (sample, BLOCK blocks of four words)."""
    tiles = tl.cdiv(count, 4 * BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    words = sample_words(rng_ptr, tl.load(ids_ptr + row), block.to(tl.uint32), STREAM)
    target = out_ptr + row * count + 4 * block.to(tl.int64)
    for i in tl.static_range(4):
        inside = 4 * block.to(tl.int64) + i < count
        if UNIFORM:
            tl.store(target + i, (words[i] >> 8).to(tl.float32) * (1.0 / (1 << 24)), mask=inside)
        else:
            tl.store(target + i, words[i].to(tl.int64), mask=inside)


def draw(out: Tensor, rng: Tensor, ids: Tensor, stream: int, count: int, is_uniform: bool) -> Tensor:
    if out.numel():
        blocks = tuned("philox")["BLOCK"]
        grid = (ids.shape[0] * cdiv(count, 4 * blocks),)
        draw_kernel[grid](
            rng.contiguous(), ids.contiguous(), out, count, STREAM=stream, UNIFORM=is_uniform, BLOCK=blocks, num_warps=4
        )
    return out


def random_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    return draw(allocate_words(rng, ids, stream, count), rng, ids, stream, count, False)


def uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    return draw(allocate_uniform(rng, ids, stream, count), rng, ids, stream, count, True)
