"""Cases of attention on packed projections: lengths and widths that fill no tile, one token, strides, low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.bfloat16, is_strided: bool = False,
    has_bias: bool = False,
) -> Case:  # fmt: skip
    def make(device: torch.device) -> Inputs:
        shape = (batch, length, 3, heads, width)
        drawn = torch.randn((*shape[:-1], 2 * width), generator=generator(21)).to(device, dtype)
        inputs = {"qkv": drawn[..., ::2] if is_strided else drawn[..., :width].contiguous()}
        if has_bias:
            inputs["bias"] = torch.randn((heads, length, length), generator=generator(22)).to(device)
        return inputs

    name = f"B{batch}_N{length}_H{heads}_d{width}{'_bias' * has_bias}_{str(dtype)[6:]}{'_strided' * is_strided}"
    # bfloat16: everything is rounded between two products of the reference.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    moved = 4 * batch * length * heads * width * dtype.itemsize
    flops = 4 * batch * heads * length * length * width
    grads = ("qkv", "bias") if has_bias else ("qkv",)
    return Case(name, "qkv_attention", make, tolerance, grads, bytes_moved=moved, flops=flops)


CASES = (
    case(2, 197, 2, 32),
    case(2, 50, 3, 64),
    case(1, 33, 2, 80),
    case(3, 7, 1, 8, is_strided=True),
    case(1, 64, 2, 20),
    case(2, 1, 2, 4),
    case(0, 5, 2, 8),
    case(17, 21, 2, 12, has_bias=True),
    case(2, 7, 3, 8, torch.float32, has_bias=True),
)
BENCH = (
    case(64, 50, 12, 64),
    case(64, 197, 16, 32),
    case(64, 197, 12, 64),
    case(64, 197, 12, 64, has_bias=True),
)
