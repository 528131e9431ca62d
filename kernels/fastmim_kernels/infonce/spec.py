"""Cases of the contrastive loss: keys of several ranks, odd widths, one row, label smoothing, low precision."""

import torch
import torch.nn.functional as F

from ..cases import Case, Inputs, generator


def case(
    batch: int, keys: int, width: int, offset: int = 0, smoothing: float = 0.0, dtype: torch.dtype = torch.float32
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(7)
        q, k = (F.normalize(torch.randn((n, width), generator=g), dim=1).to(device, dtype) for n in (batch, keys))
        return {"q": q, "k": k, "offset": offset, "temperature": 0.07, "label_smoothing": smoothing}

    name = f"B{batch}_N{keys}_D{width}_at{offset}_smooth{smoothing}_{str(dtype)[6:]}"
    tolerance = 4e-3 if dtype == torch.bfloat16 else 5e-6
    moved = (batch + keys) * width * dtype.itemsize
    return Case(
        name, "contrastive_loss", make, tolerance, ("q", "k"), bytes_moved=moved, flops=2 * batch * keys * width
    )


CASES = (
    case(7, 7, 100),
    case(5, 20, 256, offset=10),
    case(5, 20, 33, offset=15, smoothing=0.1),
    case(1, 1, 3),
    case(6, 12, 64, offset=6, dtype=torch.bfloat16),
)
BENCH = (case(128, 4096, 256), case(1024, 8192, 256))
