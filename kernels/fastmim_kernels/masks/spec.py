"""Cases of the masks: L of 224 and 64 px images, odd grids, everything kept."""

import torch

from ..cases import Case, Inputs


def source(batch: int, device: torch.device) -> Inputs:
    return {"rng": torch.tensor([7, 11], device=device), "ids": torch.arange(batch, device=device) + 5}


def bytes_moved(batch: int, patches: int) -> int:
    # ids_keep and ids_masked have L entries together; ids_restore and mask L each.
    return batch * (8 + patches * (8 + 8 + 4))


def random_case(batch: int, patches: int, keep: int) -> Case:
    return Case(
        f"B{batch}_L{patches}_K{keep}",
        "random_masking",
        lambda device: {**source(batch, device), "num_patches": patches, "num_keep": keep},
        bytes_moved=bytes_moved(batch, patches),
    )


def cell_case(batch: int, grid: tuple[int, int], cell: int, keep: int) -> Case:
    return Case(
        f"B{batch}_grid{grid[0]}x{grid[1]}_cell{cell}_keep{keep}",
        "cell_masking",
        lambda device: {**source(batch, device), "grid": grid, "cell": cell, "num_keep_cells": keep},
        bytes_moved=bytes_moved(batch, grid[0] * grid[1]),
    )


CASES = (
    random_case(3, 196, 49),
    random_case(2, 197, 1),
    random_case(2, 49, 49),
    random_case(1, 1, 1),
    random_case(0, 49, 12),
    cell_case(3, (14, 14), 2, 17),
    cell_case(2, (6, 9), 3, 4),
    cell_case(2, (7, 5), 1, 9),
)
BENCH = (random_case(1024, 196, 49), random_case(1024, 256, 64), cell_case(1024, (14, 14), 2, 17))
