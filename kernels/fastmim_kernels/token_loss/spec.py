"""Cases of the token loss: chunks that do not divide the rows, one row, no bias, low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(
    rows: int,
    width: int,
    vocabulary: int,
    chunk: int | None = None,
    has_bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(9)
        x = torch.randn((rows, width), generator=g)
        weight = torch.randn((vocabulary, width), generator=g) / width**0.5
        bias = torch.randn(vocabulary, generator=g)
        labels = torch.randint(0, vocabulary, (rows,), generator=g)
        # Half of the labels are the likeliest ones, so that the accuracy is not just 0.
        labels[::2] = (x @ weight.T + has_bias * bias).argmax(1)[::2]
        return {
            "x": x.to(device, dtype),
            "weight": weight.to(device, dtype),
            "bias": bias.to(device, dtype) if has_bias else None,
            "labels": labels.to(device),
            "chunk": chunk,
        }

    name = f"N{rows}_D{width}_V{vocabulary}_chunk{chunk}{'_bias' * has_bias}_{str(dtype)[6:]}"
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    moved = (rows * width + vocabulary * width) * dtype.itemsize + rows * 8
    return Case(name, "linear_cross_entropy", make, tolerance, bytes_moved=moved, flops=2 * rows * width * vocabulary)


CASES = (
    case(7, 10, 33, 3),
    case(8, 12, 5, 100, has_bias=False),
    case(1, 3, 2, 1),
    case(300, 16, 100),
    case(40, 24, 50, 7, dtype=torch.bfloat16),
)
BENCH = (case(6272, 768, 8192), case(6272, 768, 8192, dtype=torch.bfloat16))
