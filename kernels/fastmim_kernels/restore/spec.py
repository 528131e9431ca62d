"""Cases of the decoder input: no, one or several prefix tokens, everything or nothing visible, mixed dtypes."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import chosen_ids


def case(
    batch: int,
    patches: int,
    keep: int,
    width: int,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype = torch.float32,
    is_strided: bool = False,
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(5)
        x = torch.randn((batch, prefix + keep, 2 * width), generator=g).to(device, dtype)
        return {
            "x": x[:, :, ::2] if is_strided else x[:, :, :width].contiguous(),
            "mask_token": torch.randn((width,), generator=g).to(device, parameters),
            "pos": torch.randn((prefix + patches, width), generator=g).to(device, parameters),
            "ids_restore": chosen_ids(batch, patches, patches, device),
            "num_prefix": prefix,
        }

    result = torch.promote_types(dtype, parameters)
    dtypes = f"{str(dtype)[6:]}_{str(parameters)[6:]}"
    name = f"B{batch}_L{patches}_K{keep}_P{prefix}_D{width}_{dtypes}{'_strided' * is_strided}"
    # A bfloat16 result or gradient is rounded once, by at most 2**-8 of its size.
    tolerance = 4e-3 if torch.bfloat16 in (dtype, parameters) else 1e-6
    out = batch * (prefix + patches) * width
    moved = batch * (prefix + keep) * width * dtype.itemsize + out * result.itemsize + batch * patches * 8
    return Case(name, "restore_tokens", make, tolerance, ("x", "mask_token", "pos"), bytes_moved=moved, flops=out)


CASES = (
    case(3, 196, 49, 100),
    case(2, 49, 12, 768, dtype=torch.bfloat16),
    case(2, 49, 12, 64, dtype=torch.bfloat16, parameters=torch.bfloat16),
    case(2, 49, 49, 20, prefix=0, is_strided=True),
    case(2, 197, 1, 24, prefix=4),
    case(2, 9, 0, 8),
    case(2, 1, 1, 5),
    case(0, 9, 3, 8),
)
BENCH = (case(64, 196, 49, 512), case(64, 196, 49, 512, dtype=torch.bfloat16, parameters=torch.bfloat16))
