"""Philox in C++: sixteen counters at a time."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define

_random_words = native_library.function("random_words")
_uniform = native_library.function("uniform")


def _fill_words(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    out = ids.new_empty((len(ids), count))
    _random_words(rng.contiguous(), ids.contiguous(), len(ids), stream, count, out, torch.get_num_threads())
    return out


def _fill_uniform(rng: Tensor, ids: Tensor, stream: int, count: int) -> Tensor:
    out = ids.new_empty((len(ids), count), dtype=torch.float32)
    _uniform(rng.contiguous(), ids.contiguous(), len(ids), stream, count, out, torch.get_num_threads())
    return out


random_words = define(
    "native_random_words(Tensor rng, Tensor ids, int stream, SymInt count) -> Tensor",
    _fill_words,
    lambda rng, ids, stream, count: ids.new_empty((ids.shape[0], count)),
)
uniform = define(
    "native_uniform(Tensor rng, Tensor ids, int stream, SymInt count) -> Tensor",
    _fill_uniform,
    lambda rng, ids, stream, count: ids.new_empty((ids.shape[0], count), dtype=torch.float32),
)
