"""Random masks: which patches the encoder sees, drawn per image from (seed, step, sample id)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import MAX_PATCHES, check_grid, check_integer, check_rng, fail
from ..registration import define

__all__ = ["MaskIds", "cell_masking", "random_masking"]

# On a GPU, counting takes cells**2 comparisons per image; from here on the reference's sort takes less.
MAX_COUNTED = 4096


class MaskIds(NamedTuple):
    """One mask per image; ids are patch indices 0..L-1 in raster order, prefix tokens not counted.

    ``cat([ids_keep, ids_masked], 1)`` is the drawn order of all patches, and ``ids_restore`` is its inverse:
    patch l stands at place ``ids_restore[:, l]`` of that order, and is visible where that place is below K.
    """

    ids_keep: Tensor  # (B, K) int64
    ids_masked: Tensor  # (B, M) int64
    ids_restore: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) float32, 1 = masked


def random_masking(rng: Tensor, ids: Tensor, num_patches: int, num_keep: int) -> MaskIds:
    """Keep ``num_keep`` of ``num_patches`` patches, uniformly at random and independently per image.

    The drawn order sorts the patches by (random word of Stream.MASK, patch index): keys are unique, so every device
    gives the same order. The first ``num_keep`` are kept, in drawn order as in MAE, not in raster order.

    Args:
        rng: (2,) int64 = [seed, step]. ids: (B,) int64 global sample ids, on the same device.
        num_patches: L, 1..2**20. num_keep: K, 1..L.

    Returns: MaskIds, a NamedTuple of ids_keep (B, K), ids_masked (B, L - K) and ids_restore (B, L), int64, and mask
        (B, L), float32, 1 where masked. ``cat([ids_keep, ids_masked], 1)`` is the drawn order, ids_restore its inverse.
    Raises: ValueError for counts out of range; as ``uniform`` for rng and ids.
    Source: He et al., arXiv 2111.06377, section 3; facebookresearch/mae models_mae.py ``random_masking``.
    """
    check_rng(rng, ids)
    _check_keep("num_keep", num_patches, num_keep)
    if _sorts(ids, num_patches):
        return dispatch.reference("masks").random_masking(rng, ids, num_patches, num_keep)
    return MaskIds(*MASKS(rng, ids, 1, num_patches, 1, num_keep))


def cell_masking(rng: Tensor, ids: Tensor, grid: tuple[int, int], cell: int, num_keep_cells: int) -> MaskIds:
    """Keep ``num_keep_cells`` cells of ``cell`` x ``cell`` patches; all patches of a cell share its fate.

    Cells are drawn as ``random_masking`` draws patches. The drawn order lists the patches cell by cell, raster order
    inside a cell. With ``cell=1`` the result equals ``random_masking`` bit for bit.

    Args:
        rng, ids: as ``random_masking``.
        grid: (h, w) of the image in patches, not necessarily square.
        cell: side of a cell in patches; divides h and w.
        num_keep_cells: 1..(h / cell) * (w / cell).

    Returns: MaskIds as ``random_masking``, with K = num_keep_cells * cell**2.
    Raises: ValueError where cell does not divide the grid or num_keep_cells is out of range; as ``uniform`` for rng and
        ids.
    Source: ZhichengHuang/CMAE cmae_vit.py ``random_masking`` (2x2 cells, 17 of 49 kept).
    """
    check_rng(rng, ids)
    h, w = check_grid("grid", grid)
    check_integer("cell", cell)
    if cell < 1 or h % cell or w % cell:
        raise fail("cell", f"a divisor of the grid {h}x{w}", cell, "change the cell, the image size or the patch size")
    cells = (h // cell) * (w // cell)
    _check_keep("num_keep_cells", cells, num_keep_cells)
    if _sorts(ids, cells):
        return dispatch.reference("masks").cell_masking(rng, ids, (h, w), cell, num_keep_cells)
    return MaskIds(*MASKS(rng, ids, h, w, cell, num_keep_cells))


def _check_keep(name: str, total: int, num_keep: int) -> None:
    check_integer("num_patches", total)
    check_integer(name, num_keep)
    if not 1 <= total <= MAX_PATCHES:
        raise fail("num_patches", f"1..{MAX_PATCHES}", total, "use larger patches")
    if not 1 <= num_keep <= total:
        raise fail(name, f"1..{total}", num_keep, "correct the mask ratio; at least one patch stays visible")


def _sorts(ids: Tensor, cells: int) -> bool:
    """Whether the reference draws the mask."""
    return dispatch.uses_reference("masks", ids.device) or (ids.device.type == "cuda" and cells > MAX_COUNTED)


def allocate(rng: Tensor, ids: Tensor, rows: int, columns: int, cell: int, keep: int) -> tuple[Tensor, ...]:
    batch, length, kept = ids.shape[0], rows * columns, keep * cell * cell
    keep, masked, restore = (ids.new_empty((batch, n)) for n in (kept, length - kept, length))
    return keep, masked, restore, ids.new_empty((batch, length), dtype=torch.float32)


MASKS = define(
    "masks",
    "draw_masks(Tensor rng, Tensor ids, SymInt rows, SymInt columns, int cell, SymInt keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    allocate,
)
