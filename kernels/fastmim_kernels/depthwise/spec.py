"""Cases of the depthwise convolution: all or some patches, one-pixel patches, odd grids and widths, low precision."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import chosen_ids


def case(
    batch: int,
    grid: tuple[int, int],
    keep: int | None,
    side: int,
    width: int,
    size: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Case:
    count = grid[0] * grid[1]
    patches = count if keep is None else keep
    values = batch * patches * side * side * width

    def make(device: torch.device) -> Inputs:
        g = generator(11)
        return {
            "x": torch.randn((batch, patches, side, side, width), generator=g).to(device, dtype),
            "ids": None if keep is None else chosen_ids(batch, count, keep, device),
            "weight": torch.randn((width, 1, size, size), generator=g).to(device) / size,
            "bias": torch.randn((width,), generator=g).to(device),
            "grid": grid,
        }

    name = f"B{batch}_{grid[0]}x{grid[1]}_K{keep}_s{side}_C{width}_k{size}_{str(dtype)[6:]}"
    # Gradients of the weight add up batch x pixels products, rounded to the dtype of x before.
    tolerance = 4e-2 if dtype == torch.bfloat16 else 2e-5
    return Case(
        name,
        "depthwise_patches",
        make,
        tolerance,
        ("x", "weight", "bias"),
        bytes_moved=2 * values * dtype.itemsize,
        flops=2 * values * size * size,
    )


CASES = (
    case(3, (3, 5), 7, 4, 20),
    case(2, (2, 2), None, 2, 17),
    case(2, (1, 3), 2, 1, 33, 3),
    case(1, (3, 3), 1, 3, 1, 7),
    case(0, (2, 2), 2, 2, 8),
    case(3, (3, 5), 7, 4, 20, dtype=torch.bfloat16),
)
BENCH = (
    case(64, (14, 14), 68, 4, 256, dtype=torch.bfloat16),
    case(64, (14, 14), None, 2, 384, dtype=torch.bfloat16),
)
