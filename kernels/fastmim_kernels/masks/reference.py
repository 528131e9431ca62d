"""Masks by sorting: one random word per patch or cell, ties broken by the index."""

import torch
from torch import Tensor

from ..philox import Stream
from ..philox.reference import random_words
from . import MaskIds

INDEX_BITS = 20


def drawn_order(rng: Tensor, ids: Tensor, count: int) -> Tensor:
    """A random permutation of 0..count-1 per sample, (B, count) int64."""
    keys = random_words(rng, ids, Stream.MASK, count) << INDEX_BITS | torch.arange(count, device=ids.device)
    # The low bits of the sorted keys are the indices: no argsort, whose order of ties differs between devices.
    return keys.sort(dim=1).values & ((1 << INDEX_BITS) - 1)


def mask_ids(order: Tensor, num_keep: int) -> MaskIds:
    """The four tensors of a mask from the drawn order (B, L), whose first ``num_keep`` patches are kept."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, places)
    ids_keep, ids_masked = order[:, :num_keep].contiguous(), order[:, num_keep:].contiguous()
    return MaskIds(ids_keep, ids_masked, ids_restore, (ids_restore >= num_keep).to(torch.float32))


def random_masking(rng: Tensor, ids: Tensor, num_patches: int, num_keep: int) -> MaskIds:
    """See the public function."""
    return mask_ids(drawn_order(rng, ids, num_patches), num_keep)


def cell_masking(rng: Tensor, ids: Tensor, grid: tuple[int, int], cell: int, num_keep_cells: int) -> MaskIds:
    """See the public function."""
    h, w = grid
    # patches[c] = raster indices of the patches of cell c.
    patches = (
        torch.arange(h * w, device=ids.device)
        .view(h // cell, cell, w // cell, cell)
        .transpose(1, 2)
        .reshape(-1, cell * cell)
    )
    order = patches[drawn_order(rng, ids, len(patches))].flatten(1)
    return mask_ids(order, num_keep_cells * cell * cell)
