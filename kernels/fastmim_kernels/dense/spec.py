"""Cases of the linear layers: sizes that fill no tile, more rows than a slice, no bias, one row, none."""

import torch

from ..cases import Case, Inputs, generator


def case(
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    has_bias: bool = True,
    is_strided: bool = False,
    function: str = "linear",
) -> Case:
    # Behind a GELU what lies between the two is rounded, too: twice the error, and sums that are no larger than it is.
    scale, tolerance = (2**-4, 4e-2) if function == "gelu_linear" else (1, 2e-2)
    # A gradient adds up as many roundings as there are rows.
    spread = 2**-5 if function == "gelu_linear" and torch.Size(rows).numel() > 1024 else 1

    def make(device: torch.device) -> Inputs:
        g = generator(22)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g).to(device, torch.bfloat16)

        x = spread * draw(*rows, 2 * inputs)
        return {
            "x": x[..., ::2] if is_strided else x[..., :inputs].contiguous(),
            "weight": scale * draw(outputs, inputs),
            "bias": draw(outputs) if has_bias else None,
        }

    count = torch.Size(rows).numel()
    name = f"{'x'.join(map(str, rows))}_{inputs}to{outputs}{'_bias' * has_bias}{'_strided' * is_strided}_bfloat16"
    grads = ("x", "weight", *(("bias",) if has_bias else ()))
    moved = 2 * (count * (inputs + outputs) + inputs * outputs)
    return Case(name, function, make, tolerance, grads, bytes_moved=moved, flops=2 * count * inputs * outputs)


CASES = (
    case((3, 7), 20, 36),
    case((2, 33), 64, 32),
    case((1, 1100), 33, 17),
    case((2, 2, 5), 96, 130, has_bias=False),
    case((1,), 4, 4),
    case((5, 9), 31, 33, is_strided=True),
    case((0, 3), 8, 16),
    case((3, 7), 20, 36, function="gelu_linear"),
    case((1, 9), 64, 33, function="gelu_linear"),
    case((2, 5), 96, 130, has_bias=False, is_strided=True, function="gelu_linear"),
)
BENCH = (
    case((64, 197), 512, 2048),
    case((64, 197), 2048, 512),
    case((64, 50), 768, 3072),
    case((64, 50), 768, 2304),
    case((64, 197), 2048, 512, function="gelu_linear"),
    case((64, 50), 3072, 768, function="gelu_linear"),
)
