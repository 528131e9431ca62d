"""Block masks: rectangles of patches are hidden until an exact number is, drawn from (seed, step, sample id)."""

import math

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_grid, check_integer, check_number, check_rng, fail, shown
from ..masks import MaskIds
from ..registration import define

__all__ = ["block_masking"]

# Patches that a GPU's program can hold; larger grids are left to the reference there.
MAX_HELD = 1024


def block_masking(
    rng: Tensor,
    ids: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_block: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> MaskIds:
    """Mask exactly ``num_masked`` patches of every image with random rectangles, which favors the center of the grid.

    Until the number is reached, with ``missing`` the patches that are still to be masked: draw an area uniformly
    between ``min_block`` and ``missing`` (whichever is smaller) and a log-uniform aspect r; the rectangle has
    h = round(sqrt(area * r)) rows and w = round(sqrt(area / r)) columns and lies anywhere inside the grid, borders
    included; it is masked if h and w are both smaller than the grid's and it adds between 1 and ``missing`` patches.

    The draws of a sample are words of Stream.BLOCK. The number of draws is fixed, with no host synchronization, so it
    may run out: at 14x14 for none of 100,000 masks of 98 patches and for 37 of as many of 147; for every tenth of 684
    patches at 37x37. The missing ones are then the patches with the most masked neighbors (up, down, left, right),
    ties in raster order from a random patch on, so the number is always exact and every call ends.

    Args:
        rng: (2,) int64 = [seed, step]. ids: (B,) int64 global sample ids, on the same device.
        grid: (h, w) of the image in patches, not necessarily square.
        num_masked: M, 1..h * w - 1.
        min_block: smallest area to ask for, in patches, while more than that is missing; at least 1.
        aspect: (lowest, highest) r = rows / columns, 1e-6 <= lowest <= highest <= 1e6.

    Returns: MaskIds as ``random_masking``, whose ids_keep and ids_masked are both in raster (ascending) order.
    Raises: ValueError for a grid, count, block or aspect out of range; as ``uniform`` for rng and ids.
    Source: Bao et al., BEiT, arXiv 2106.08254, algorithm 1; Atten4Vis/CAE furnace/masking_generator.py, which goes on
        until the number is exact. There a block has 10 tries and a failed block is started anew, which is the same as
        trying on and on.
    """
    check_rng(rng, ids)
    h, w = check_grid("grid", grid)
    check_integer("num_masked", num_masked)
    check_integer("min_block", min_block)
    if not 1 <= num_masked < h * w:
        raise fail("num_masked", f"1..{h * w - 1}", num_masked, "correct the mask ratio; something must stay visible")
    if min_block < 1:
        raise fail("min_block", "at least 1 patch", min_block, "correct min_block")
    if not isinstance(aspect, (tuple, list)) or len(aspect) != 2:
        raise fail("aspect", "two numbers", shown(aspect), "pass (lowest, highest)", TypeError)
    for end in aspect:
        check_number("aspect", end)
    # Sides stay far below the largest integers.
    if not 1e-6 <= aspect[0] <= aspect[1] <= 1e6:
        raise fail("aspect", "1e-6 <= lowest <= highest <= 1e6", aspect, "correct aspect")
    is_too_large = ids.device.type == "cuda" and h * w > MAX_HELD
    if is_too_large or dispatch.uses_reference("block_masks", ids.device):
        return dispatch.reference("block_masks").block_masking(
            rng, ids, (h, w), num_masked, min_block=min_block, aspect=tuple(aspect)
        )
    return MaskIds(*BLOCK_MASKS(rng, ids, h, w, num_masked, min_block, *(math.log(a) for a in aspect)))


def allocate(rng: Tensor, ids: Tensor, rows, columns, num_masked, min_block, low, high) -> tuple[Tensor, ...]:
    batch, length = ids.shape[0], rows * columns
    keep, masked, restore = (ids.new_empty((batch, n)) for n in (length - num_masked, num_masked, length))
    return keep, masked, restore, ids.new_empty((batch, length), dtype=torch.float32)


BLOCK_MASKS = define(
    "block_masks",
    "block_masking(Tensor rng, Tensor ids, int rows, int columns, int num_masked, int min_block, float low, float high)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    allocate,
)
