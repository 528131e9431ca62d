"""Masking policies: which patches of which image stay visible, as functions of (seed, step, sample id)."""

from fastmim_kernels import MaskIds, block_masking, cell_masking, random_masking
from torch import Tensor

from fastmim.config import ConfigError, ModelSpec, count_kept

MaskPlan = MaskIds


def _count_kept(total: int, mask_ratio: float) -> int:
    """As `count_kept`; a loss on masked patches needs one of them, too."""
    kept = count_kept(total, mask_ratio, "mask ratio")
    if kept == total:
        unit = f"1 of {total} patches or cells"
        raise ConfigError(
            f"mask ratio: expected at least {unit} to be masked, got ratio {mask_ratio}, which masks 0; take a larger one"
        )
    return kept


def plan_of(order: Tensor, num_keep: int) -> MaskPlan:
    """The mask whose first patches in given orders (B, L) are visible."""
    ids_restore = order.argsort(dim=1)
    mask = (ids_restore >= num_keep).float()
    return MaskPlan(order[:, :num_keep].contiguous(), order[:, num_keep:].contiguous(), ids_restore, mask)


class RandomPolicy:
    """Uniformly random patches, an exact number per image. Source: MAE, arXiv 2111.06377 section 3."""

    def __init__(self, model: ModelSpec, mask_ratio: float):
        self.num_patches = model.num_patches
        self.num_keep = _count_kept(model.num_patches, mask_ratio)

    def __call__(self, rng: Tensor, ids: Tensor) -> MaskPlan:
        return random_masking(rng, ids, self.num_patches, self.num_keep)


class CellPolicy:
    """Random cells of `cell` x `cell` patches, an exact number per image.

    Source: ZhichengHuang/CMAE backbones/cmae_vit.py `random_masking`: 17 of 49 cells of 2 x 2 patches stay visible at
    ratio 0.65.
    """

    def __init__(self, model: ModelSpec, mask_ratio: float, cell: int):
        height, width = model.grid
        if cell < 1 or height % cell or width % cell:
            raise ConfigError(
                f"mask cell: expected a divisor of the patch grid {height} x {width}, got {cell}; "
                f"set the method's mask_cell to 1 or choose another --image-size"
            )
        self.grid, self.cell = model.grid, cell
        self.num_keep = _count_kept((height // cell) * (width // cell), mask_ratio)

    def __call__(self, rng: Tensor, ids: Tensor) -> MaskPlan:
        return cell_masking(rng, ids, self.grid, self.cell, self.num_keep)


class BlockPolicy:
    """Random rectangles of patches, an exact number of patches per image; ids are in raster order.

    The smallest area that is asked for is 16 of 196 patches, and on other grids the same share of them: a fixed 16
    would be more than what a grid of 4 x 4 has to mask.

    Source: Atten4Vis/CAE furnace/masking_generator.py.
    """

    def __init__(self, model: ModelSpec, mask_ratio: float):
        self.grid = model.grid
        self.num_masked = model.num_patches - _count_kept(model.num_patches, mask_ratio)
        self.min_block = max(1, round(16 / 196 * model.num_patches))

    def __call__(self, rng: Tensor, ids: Tensor) -> MaskPlan:
        return block_masking(rng, ids, self.grid, self.num_masked, min_block=self.min_block)
