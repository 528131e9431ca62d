"""Which image comes when, and which box is cut out of it: pure functions of (seed, epoch, position or sample id).

Nothing here has a state, so a run resumes at any step, on any number of ranks and workers, with the same samples.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache

import numpy as np

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8
# A network on halves of 1 or 2 bits favors some permutations (measured: chi-square of the 120 orders of 5 images over
# 12,000 seeds is 5 deviations too high); from 3 bits on no bias shows.
_LEAST_HALF_BITS = 3
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_BETA_NODES = 1024
# Domains keep the draws of different purposes apart even where seed, epoch and sample are the same.
_ORDER, _CROP, _SUBSTITUTE = 0x6F72646572, 0x63726F70, 0x73756273


def _mix(value: int) -> int:
    """The finalizer of splitmix64 on one Python integer. Source: Steele, Lea, Flood (OOPSLA 2014), variant 13."""
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _hash(*words: int) -> int:
    """Chain 64-bit words into one; every word and its place matter."""
    state = 0
    for word in words:
        state = _mix(state ^ _mix(word & _MASK64))
    return state


def _mix_array(value: np.ndarray) -> np.ndarray:
    """`_mix` on a uint64 array; the wrap-around of the products is wanted."""
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(seed: int, epoch: int, count: int, positions: np.ndarray) -> np.ndarray:
    """Where a random permutation of 0..count-1 sends the given positions, without ever holding the permutation.

    A balanced Feistel network over the next even power of two is a bijection for any round function; walking on from
    a value outside the range until one falls inside keeps it a bijection of 0..count-1 (cycle walking: fewer than four
    rounds of it on average from 17 images on). Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains
    (CT-RSA 2002).

    Args:
        seed, epoch: any integers; each pair gives its own permutation.
        count: size of the data set, 1..2**62.
        positions: integers in 0..count-1, any shape.
    Returns:
        int64 array of the same shape.
    Raises:
        ValueError: count or a position out of range.
    """
    if not 1 <= count <= 1 << 62:
        raise ValueError(f"count: expected 1..2**62, got {count}.")
    positions = np.asarray(positions, dtype=np.int64)
    flat = positions.reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >= count):
        raise ValueError(f"positions: expected 0..{count - 1}, got {flat.min()}..{flat.max()}.")

    half_bits = max(_LEAST_HALF_BITS, ((count - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(_hash(_ORDER, seed, epoch, i)) for i in range(_ROUNDS)]

    result = flat.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        value = result[walking]
        left, right = value >> shift, value & mask
        for key in keys:
            # The high half of the mix: its bits depend on all the bits that went in.
            left, right = right, left ^ ((_mix_array(right ^ key) >> np.uint64(32)) & mask)
        value = (left << shift) | right
        result[walking] = value
        walking = walking[value >= np.uint64(count)]
    return result.astype(np.int64).reshape(positions.shape)


def batch_positions(step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """Positions in the epoch's order that one rank takes at one step: its contiguous slice of the global batch.

    Raises:
        ValueError: the global batch does not divide by the number of ranks, or the rank is not one of them.
    """
    if global_batch < 1 or world < 1 or global_batch % world:
        raise ValueError(f"batch_size: expected a multiple of {world} (ranks), got {global_batch}; change one of them.")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0..{world - 1}, got {rank}.")
    local = global_batch // world
    start = step * global_batch + rank * local
    return np.arange(start, start + local, dtype=np.int64)


def crop_box(
    seed: int,
    epoch: int,
    sample_id: int,
    view: int,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    around: tuple[float, float, float, float] | None = None,
    alpha: float = 1.0,
) -> tuple[int, int, int, int]:
    """The random box of one view of one sample: (left, top, width, height), whole pixels inside the image.

    The semantics of torchvision's RandomResizedCrop.get_params: ten tries with an area uniform in `scale` and a
    log-uniform aspect in `ratio`; then the largest central box of an allowed aspect.

    With `around`, a region (top, left, bottom, right) in shares of the image, the center of the box lies in that region
    as far as the image's border allows, at a place that is Beta(alpha, alpha) distributed on both axes: below 1, alpha
    prefers the region's border (two views differ more), 1 is uniform. Source: xyupeng/ContrastiveCrop
    datasets/transforms/ContrastiveCrop.py. With the whole image and alpha 1 this is the plain crop again, except that
    the last offset is never drawn: the source rounds down.

    The numbers are raw words of Philox4x64-10, one block of four per try, turned into uniforms here: NumPy keeps bit
    streams stable across versions, not its distributions. Source: NEP 19.
    """
    key, counter = 0, 0
    for word in (_CROP, seed):
        key = (key << 64) | (word & _MASK64)
    for word in (view, epoch, sample_id, 0):  # the lowest word counts the blocks
        counter = (counter << 64) | (word & _MASK64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4 * _CROP_TRIES).tolist()
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for first in range(0, len(words), 4):
        for_area, for_aspect, for_left, for_top = words[first : first + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * _uniform(for_area))
        aspect = math.exp(log_low + (log_high - log_low) * _uniform(for_aspect))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            if around is not None:
                top, left, bottom, right = around
                return (
                    _centered(for_left, left, right, width, box_width, alpha),
                    _centered(for_top, top, bottom, height, box_height, alpha),
                    box_width,
                    box_height,
                )
            return (
                _below(for_left, width - box_width + 1),
                _below(for_top, height - box_height + 1),
                box_width,
                box_height,
            )
    return _central_box(width, height, ratio)


def _centered(word: int, low: float, high: float, side: int, box_side: int, alpha: float) -> int:
    """Offset on one axis of a box whose center falls between the shares low and high of the image's side."""
    first, last = (min(max(int(side * edge) - box_side // 2, 0), side - box_side) for edge in (low, high))
    return first + int((last - first) * beta_quantile(_uniform(word), alpha))


def beta_quantile(probability: float, alpha: float) -> float:
    """Inverse distribution function of Beta(alpha, alpha) for alpha in (0, 1].

    An inverse takes one random word per number, whatever alpha, and for alpha 1 it is the identity. Rejection methods
    (Johnk's, Cheng's) take an unknown number of words, so they would need a limit and a fallback.
    """
    if alpha == 1:
        return probability
    upper = probability > 0.5
    powers, distribution = _beta_table(alpha)
    wanted = 1 - probability if upper else probability
    k = min(bisect_right(distribution, wanted), _BETA_NODES) - 1
    share = (wanted - distribution[k]) / (distribution[k + 1] - distribution[k])
    quantile = (powers[k] + share * (powers[k + 1] - powers[k])) ** (1 / alpha)
    return 1 - quantile if upper else quantile


@lru_cache(maxsize=8)
def _beta_table(alpha: float) -> tuple[list[float], list[float]]:
    """Nodes t = x ** alpha for x from 0 to 1/2, and the distribution function there.

    In t the density is proportional to (1 - x) ** (alpha - 1), smooth and between 1 and 2 on this half: the poles of
    the density in x are gone, and Simpson's rule and straight lines between the nodes suffice.
    """
    step = 0.5**alpha / _BETA_NODES
    density = [(1 - (k * step / 2) ** (1 / alpha)) ** (alpha - 1) for k in range(2 * _BETA_NODES + 1)]
    sums = [0.0]
    for k in range(0, 2 * _BETA_NODES, 2):
        sums.append(sums[-1] + density[k] + 4 * density[k + 1] + density[k + 2])
    return [k * step for k in range(_BETA_NODES + 1)], [0.5 * value / sums[-1] for value in sums]


def _central_box(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = min(height, max(1, round(width / ratio[0])))
    elif width / height > ratio[1]:
        box_width = min(width, max(1, round(height * ratio[1])))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def _uniform(word: int) -> float:
    """53 bits of a 64-bit word as a float in [0, 1)."""
    return (word >> 11) * 2.0**-53


def _below(word: int, limit: int) -> int:
    """A 64-bit word as an integer in 0..limit-1 (Lemire's multiplication; the bias is below limit / 2**64)."""
    return (word * limit) >> 64


def center_box(
    width: int, height: int, size_ratio: float = 224 / 256, aspect: float = 1.0
) -> tuple[float, float, float, float]:
    """The box of evaluation: (left, top, width, height) of the center, in fractional source pixels.

    Resizing the short side to 256 and cutting the central 224 is one resize of this box; it saves the second rounding.
    `aspect` is width / height of the picture wanted.
    """
    box_width = min(width, height * aspect) * size_ratio
    box_height = box_width / aspect
    return (width - box_width) / 2, (height - box_height) / 2, box_width, box_height


def substitute(seed: int, epoch: int, sample_id: int, attempt: int, count: int) -> int:
    """Another sample in place of a bad one: never the same, equal on every rank, worker and resumed run.

    Raises:
        ValueError: there is no other sample.
    """
    if count < 2:
        raise ValueError(f"substitute: expected at least 2 images to choose from, got {count}.")
    return (sample_id + 1 + _below(_hash(_SUBSTITUTE, seed, epoch, sample_id, attempt), count - 1)) % count
