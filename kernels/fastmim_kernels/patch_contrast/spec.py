"""Cases of the patch contrast: equal and unequal shares, patches without a partner, one image, low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(groups: int, patches: int, width: int, members: int, temperature=0.25, dtype=torch.float32) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(11)
        return {
            "features": torch.randn((groups, patches, width), generator=g).to(device, dtype),
            "src": torch.randint(0, members, (groups, patches), generator=g).to(device),
            "temperature": temperature,
        }

    name = f"G{groups}_L{patches}_D{width}_M{members}_t{temperature}_{str(dtype)[6:]}"
    # A bfloat16 gradient is rounded to the dtype of the features; the loss is float32.
    tolerance = 1e-3 if dtype == torch.bfloat16 else 2e-6
    moved = groups * patches * (width * dtype.itemsize + 8)
    flops = 2 * groups * patches * patches * width
    return Case(name, "patch_contrastive_loss", make, tolerance, ("features",), bytes_moved=moved, flops=flops)


CASES = (
    case(2, 196, 100, 4),
    case(3, 49, 33, 3, temperature=0.1),
    case(2, 16, 64, 1),
    case(2, 9, 20, 9),
    case(1, 2, 3, 2),
    case(2, 49, 64, 4, dtype=torch.bfloat16),
)
BENCH = (case(16, 196, 768, 4), case(16, 196, 768, 4, dtype=torch.bfloat16))
