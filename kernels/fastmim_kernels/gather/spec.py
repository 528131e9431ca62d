"""Cases of the token gather: sizes that divide nothing, one token, none, non-contiguous tokens."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import chosen_ids


def case(
    batch: int, patches: int, keep: int, width: int, dtype: torch.dtype = torch.float32, is_strided: bool = False
) -> Case:
    def make(device: torch.device) -> Inputs:
        x = torch.randn((batch, patches, 2 * width), generator=generator(4)).to(device, dtype)
        x = x[:, :, ::2] if is_strided else x[:, :, :width].contiguous()
        return {"x": x, "ids": chosen_ids(batch, patches, keep, device)}

    name = f"B{batch}_L{patches}_K{keep}_D{width}_{str(dtype)[6:]}{'_strided' * is_strided}"
    moved = batch * keep * (8 + 2 * width * dtype.itemsize)
    return Case(name, "gather_tokens", make, grads=("x",), bytes_moved=moved)


CASES = (
    case(3, 196, 49, 100),
    case(2, 197, 50, 768, torch.bfloat16),
    case(2, 49, 49, 100, is_strided=True),
    case(2, 1, 1, 7),
    case(2, 5, 0, 8),
    case(0, 5, 2, 8),
)
BENCH = (case(64, 196, 49, 768), case(64, 196, 49, 768, torch.bfloat16))
