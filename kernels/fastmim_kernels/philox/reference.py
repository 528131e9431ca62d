"""Philox4x32-10 in int64 arithmetic. Every intermediate stays below 2**49, so nothing overflows on any device.

Source: Salmon et al., SC 2011; constants from Random123 ``philox.h``.
"""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, for a and m below 2**32: schoolbook with a = 2**16 * (a >> 16) + (a & 0xffff)."""
    low, high = (a & 0xFFFF) * m, (a >> 16) * m
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & LOW


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The bijection: four counter words and two key words (int64 holding uint32, broadcast together) -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = multiply(c0, MULTIPLIERS[0])
        high1, low1 = multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def random_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    """See the public function."""
    seed, step = rng.unbind()
    block = torch.arange((count + 3) // 4, device=ids.device)
    sample = ids[:, None]
    counter = (block, sample & LOW, step & LOW, stream | (((sample >> 32) & 0xFFFF) << 16))
    words = torch.stack(philox4x32(counter, (seed & LOW, (seed >> 32) & LOW)), dim=-1)  # (B, blocks, 4)
    return words.flatten(1)[:, :count].contiguous()


def uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    """See the public function."""
    return (random_words(rng, ids, stream, count) >> 8).to(torch.float32) * 2.0**-24
