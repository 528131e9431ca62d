"""Masks in C++: a counting sort of random words per image."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define
from . import MaskIds

_draw_masks = native_library.function("draw_masks")


def _fake(rng: Tensor, ids: Tensor, rows: int, columns: int, cell: int, keep: int) -> tuple[Tensor, ...]:
    batch, count, kept = ids.shape[0], rows * columns, keep * cell * cell
    new = ids.new_empty
    return new((batch, kept)), new((batch, count - kept)), new((batch, count)), new((batch, count), dtype=torch.float32)


def _compute(rng: Tensor, ids: Tensor, rows: int, columns: int, cell: int, keep: int) -> tuple[Tensor, ...]:
    outs = _fake(rng, ids, rows, columns, cell, keep)
    threads = torch.get_num_threads()
    _draw_masks(rng.contiguous(), ids.contiguous(), len(ids), rows, columns, cell, keep, *outs, threads)
    return outs


_op = define(
    "native_draw_masks(Tensor rng, Tensor ids, SymInt rows, SymInt columns, int cell, SymInt keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _compute,
    _fake,
)


def random_masking(rng: Tensor, ids: Tensor, num_patches: int, num_keep: int) -> MaskIds:
    """See the public function: one row of cells of one patch each."""
    return MaskIds(*_op(rng, ids, 1, num_patches, 1, num_keep))


def cell_masking(rng: Tensor, ids: Tensor, grid: tuple[int, int], cell: int, num_keep_cells: int) -> MaskIds:
    """See the public function."""
    return MaskIds(*_op(rng, ids, *grid, cell, num_keep_cells))
