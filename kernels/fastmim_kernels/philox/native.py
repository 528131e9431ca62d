"""Philox in C++: sixteen counters at a time."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate_uniform, allocate_words

_random_words = native_library.function("random_words")
_uniform = native_library.function("uniform")


def random_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    out = allocate_words(rng, ids, stream, count)
    _random_words(rng.contiguous(), ids.contiguous(), len(ids), stream, count, out, torch.get_num_threads())
    return out


def uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    out = allocate_uniform(rng, ids, stream, count)
    _uniform(rng.contiguous(), ids.contiguous(), len(ids), stream, count, out, torch.get_num_threads())
    return out
