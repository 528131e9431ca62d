"""Masks in C++: a counting sort of random words per image."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate

_draw_masks = native_library.function("draw_masks")


def draw_masks(rng: Tensor, ids: Tensor, rows: int, columns: int, cell: int, keep: int) -> tuple[Tensor, ...]:
    outs = allocate(rng, ids, rows, columns, cell, keep)
    threads = torch.get_num_threads()
    _draw_masks(rng.contiguous(), ids.contiguous(), len(ids), rows, columns, cell, keep, *outs, threads)
    return outs
