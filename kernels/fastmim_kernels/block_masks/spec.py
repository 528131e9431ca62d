"""Cases of the block masks: the grid of 224 px images, small and odd grids, one row, counts that no rectangle gives."""

from ..cases import Case
from ..masks.spec import bytes_moved, source


def case(batch: int, grid: tuple[int, int], masked: int, min_block: int = 16) -> Case:
    return Case(
        f"B{batch}_grid{grid[0]}x{grid[1]}_M{masked}_from{min_block}",
        "block_masking",
        lambda device: {**source(batch, device), "grid": grid, "num_masked": masked, "min_block": min_block},
        bytes_moved=bytes_moved(batch, grid[0] * grid[1]),
    )


CASES = (
    case(5, (14, 14), 98),
    case(3, (14, 14), 195),
    case(4, (4, 4), 8, 1),
    case(3, (7, 5), 17, 3),
    case(2, (1, 9), 4, 1),
    case(2, (1, 2), 1),
    case(0, (14, 14), 75),
)
BENCH = (case(64, (14, 14), 98), case(1024, (14, 14), 98), case(64, (4, 4), 8, 1))
