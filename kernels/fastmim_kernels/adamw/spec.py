"""Cases of the AdamW step: with and without moving averages, copies and clipping; low-precision gradients."""

import torch

from ..cases import Case, Inputs, generator
from ..ema.spec import BLOCK, SHAPES

RESULTS = ("params", "exp_avgs", "exp_avg_sqs")


def case(
    name: str,
    shapes: list[tuple[int, ...]],
    step: int = 3,
    grad: torch.dtype = torch.float32,
    copy: torch.dtype | None = None,
    has_targets: bool = True,
    is_tensor: bool = False,
    applied: bool | None = None,
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(17)

        def draw(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
            return [torch.randn(shape, generator=g).to(device, dtype) for shape in shapes]

        def number(value: float) -> float | torch.Tensor:
            return torch.tensor(value, device=device) if is_tensor else value

        named: Inputs = {
            "params": draw(), "grads": draw(grad), "exp_avgs": draw(), "exp_avg_sqs": [t.square() + 0.01 for t in draw()],
            "step": number(step), "lr": number(1e-2), "grad_scale": number(0.3), "weight_decay": 0.1,
        }  # fmt: skip
        if has_targets:
            # The first parameter has none.
            named |= {"targets": [None, *draw()[1:]], "momentum": number(0.996)}
        if copy is not None:
            named["copies"] = [t.to(copy) for t in draw()]
        if applied is not None:
            # Beside it, what parameters may have of their own: a decay, and no copy.
            named["applied"] = torch.tensor(applied, device=device)
            named["weight_decay"] = [0.1 * (i % 3) for i in range(len(shapes))]
            named["copies"][-1] = None
        return named

    count = sum(torch.Size(shape).numel() for shape in shapes)
    results = RESULTS + ("targets",) * has_targets + ("copies",) * (copy is not None)
    moved = count * (6 * 4 + grad.itemsize + 8 * has_targets + (copy.itemsize if copy else 0))
    tolerance = 2e-6 if copy is None else 4e-3
    return Case(name, "adamw_ema", make, tolerance, result=results, bytes_moved=moved, flops=15 * count)


CASES = (
    case("5_tensors_ema", SHAPES),
    case("5_tensors_first_step", SHAPES, step=1, has_targets=False),
    case("5_tensors_ema_copy_bfloat16", SHAPES, grad=torch.bfloat16, copy=torch.bfloat16),
    case("5_tensors_ema_grads_float16_tensors", SHAPES, grad=torch.float16, is_tensor=True),
    case("5_tensors_ema_copy_applied", SHAPES, copy=torch.bfloat16, applied=True),
    case("5_tensors_ema_copy_skipped", SHAPES, copy=torch.bfloat16, applied=False),
)
BENCH = (
    case("ViT-B_4_blocks_ema", 4 * BLOCK),
    case("ViT-B_4_blocks_ema_bfloat16", 4 * BLOCK, grad=torch.bfloat16, copy=torch.bfloat16),
)
