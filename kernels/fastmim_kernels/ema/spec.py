"""Cases of the moving average: many shapes at once, low-precision online tensors, momentum as a tensor."""

import torch

from ..cases import Case, Inputs, generator


def case(
    name: str,
    shapes: list[tuple[int, ...]],
    momentum: float,
    online: torch.dtype = torch.float32,
    is_tensor: bool = False,
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(10)
        targets = [torch.randn(shape, generator=g).to(device) for shape in shapes]
        onlines = [torch.randn(shape, generator=g).to(device, online) for shape in shapes]
        factor = torch.tensor(momentum, device=device) if is_tensor else momentum
        return {"targets": targets, "onlines": onlines, "momentum": factor}

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        name, "ema_update", make, 1e-6, result=("targets",), bytes_moved=count * (8 + online.itemsize), flops=3 * count
    )


SHAPES: list[tuple[int, ...]] = [(3, 5), (100,), (), (7, 1, 2), (0,)]
CASES = (
    case("5_tensors_m0.996", SHAPES, 0.996),
    case("5_tensors_m0.996_bfloat16", SHAPES, 0.996, torch.bfloat16),
    case("5_tensors_m0.99_tensor", SHAPES, 0.99, is_tensor=True),
    case("5_tensors_m0", SHAPES, 0.0),
)
BLOCK: list[tuple[int, ...]] = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
BENCH = (case("ViT-B_4_blocks", 4 * BLOCK, 0.996), case("ViT-B_4_blocks_bfloat16", 4 * BLOCK, 0.996, torch.bfloat16))
