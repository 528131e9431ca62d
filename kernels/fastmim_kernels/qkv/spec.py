"""Cases of attention on packed projections: lengths and widths that fill no tile, one token, strides, low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.bfloat16, is_strided: bool = False
) -> Case:
    def make(device: torch.device) -> Inputs:
        shape = (batch, length, 3, heads, width)
        drawn = torch.randn((*shape[:-1], 2 * width), generator=generator(21)).to(device, dtype)
        return {"qkv": drawn[..., ::2] if is_strided else drawn[..., :width].contiguous()}

    name = f"B{batch}_N{length}_H{heads}_d{width}_{str(dtype)[6:]}{'_strided' * is_strided}"
    # bfloat16: everything is rounded between two products of the reference.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    moved = 4 * batch * length * heads * width * dtype.itemsize
    flops = 4 * batch * heads * length * length * width
    return Case(name, "qkv_attention", make, tolerance, ("qkv",), bytes_moved=moved, flops=flops)


CASES = (
    case(2, 197, 2, 32),
    case(2, 50, 3, 64),
    case(1, 33, 2, 80),
    case(3, 7, 1, 8, is_strided=True),
    case(1, 64, 2, 20),
    case(2, 1, 2, 4),
    case(0, 5, 2, 8),
)
BENCH = (
    case(64, 50, 12, 64),
    case(64, 197, 16, 32),
    case(64, 197, 12, 64),
)
