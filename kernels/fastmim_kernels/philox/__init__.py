"""Random numbers as a function of (seed, step, sample id, stream): the same on every device, at every world size."""

from enum import IntEnum

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_integer, check_rng, fail
from ..registration import define

__all__ = ["Stream", "random_words", "uniform"]


class Stream(IntEnum):
    """What a draw is for. Draws of different streams are independent. Never renumber: recorded runs depend on it."""

    MASK = 0
    FLIP = 1
    SHIFT = 2
    JITTER = 3
    MIX = 4
    DROP_PATH = 5
    BLOCK = 6
    POSITION = 7
    CONTRAST = 8


def random_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    """Draw ``count`` 32-bit random words per sample with Philox4x32-10.

    Word i = philox(counter=(i // 4, id low 32 bits, step low 32 bits, stream | (id >> 32 & 0xffff) << 16),
    key=(seed low 32 bits, seed high 32 bits))[i % 4]. No host synchronization; a captured CUDA graph draws anew when
    rng changes. In plain torch: philox/reference.py, ten rounds of two products of 32 bits each.

    Args:
        rng: (2,) int64 = [seed, step], on the device of ids.
        ids: (B,) int64 global sample ids; bits 0..47 count.
        stream: a Stream, or any integer in 0..65535.
        count: words per sample, 0..2**34.

    Returns: (B, count) int64 with values in 0..2**32 - 1.
    Raises: ValueError or TypeError for an rng or ids of another shape, dtype or device; ValueError for stream or count
        out of range.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    _check(rng, ids, stream, count)
    if dispatch.uses_reference("philox", ids.device):
        return dispatch.reference("philox").random_words(rng, ids, int(stream), count)
    return WORDS(rng, ids, int(stream), count)


def uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    """Draw ``count`` uniform numbers per sample: (word >> 8) * 2**-24 of ``random_words``, exact in float32.

    Args, Raises: as ``random_words``.
    Returns: (B, count) float32 in [0, 1).
    """
    _check(rng, ids, stream, count)
    if dispatch.uses_reference("philox", ids.device):
        return dispatch.reference("philox").uniform(rng, ids, int(stream), count)
    return UNIFORM(rng, ids, int(stream), count)


def _check(rng: Tensor, ids: Tensor, stream: int, count: int) -> None:
    check_rng(rng, ids)
    check_integer("stream", stream)
    check_integer("count", count)
    if not 0 <= stream <= 0xFFFF:
        raise fail("stream", "0..65535", stream, "use a member of Stream")
    if not 0 <= count <= 1 << 34:
        raise fail("count", "0..2**34 words per sample", count, "draw fewer numbers per stream")


def allocate_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    return ids.new_empty((ids.shape[0], count))


def allocate_uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    return ids.new_empty((ids.shape[0], count), dtype=torch.float32)


WORDS = define("philox", "random_words(Tensor rng, Tensor ids, int stream, SymInt count) -> Tensor", allocate_words)
UNIFORM = define("philox", "uniform(Tensor rng, Tensor ids, int stream, SymInt count) -> Tensor", allocate_uniform)
