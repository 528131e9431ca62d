"""Cases of the residual addition with LayerNorm: every optional part, odd widths, a wider stream than the branch."""

from functools import partial

import torch

from ..cases import Case, Inputs, generator
from . import reference


def case(
    shape: tuple[int, ...],
    parts: str,
    dtype: torch.dtype = torch.float32,
    stream: torch.dtype = torch.float32,
    is_strided: bool = False,
) -> Case:
    """``parts``: any of "residual bias scale rows prenorm"."""
    width, count = shape[-1], torch.Size(shape).numel()

    def make(device: torch.device) -> Inputs:
        g = generator(14)

        def draw(*sizes: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(sizes, generator=g).to(device, kind)

        x = draw(*shape[:-1], 2 * width, kind=dtype)
        named: Inputs = {
            "x": x[..., ::2] if is_strided else x[..., :width].contiguous(),
            "residual": draw(*shape, kind=stream) if "residual" in parts else None,
            "weight": 1 + 0.2 * draw(width),
            "bias": draw(width) if "bias" in parts else None,
        }
        if "scale" in parts:
            named["scale"] = draw(width)
        if "rows" in parts:
            named["row_scale"] = (torch.arange(shape[0]) % 3 * 0.7).to(device)
        return named | {"prenorm": "prenorm" in parts}

    dtypes = "_".join(str(d)[6:] for d in (dtype, stream))
    name = f"{'x'.join(map(str, shape))}_{parts.replace(' ', '+') or 'norm'}_{dtypes}{'_strided' * is_strided}"
    # Results are rounded once, and the stream before it is normalized: in the truth, too. In float32 a gradient of the weights
    # adds up errors of all rows, far below what the others round.
    of_sums = 2e-5 * max(1.0, (count / width / 64) ** 0.5)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, of_sums)
    grads = ("x", "weight", *(p for p in ("residual", "bias", "scale") if p in parts))
    moved = count * (2 * dtype.itemsize + ("residual" in parts) * stream.itemsize * (1 + ("prenorm" in parts)))
    truth = partial(reference.add_layer_norm, stream=stream if "residual" in parts else dtype)
    return Case(name, "add_layer_norm", make, tolerance, grads, bytes_moved=moved, flops=9 * count, truth=truth)


ALL = "residual bias scale rows prenorm"
CASES = (
    case((3, 7, 100), ""),
    case((3, 7, 100), "bias"),
    case((2, 5, 768), "residual bias prenorm"),
    case((4, 3, 65), ALL),
    case((4, 3, 65), ALL, torch.bfloat16),
    case((3, 49, 384), "residual bias prenorm", torch.bfloat16, torch.bfloat16),
    case((2, 3, 4096), "residual bias scale", torch.float16),
    case((5, 33), "residual rows", is_strided=True),
    case((2, 3, 3), "residual bias"),
    case((0, 3, 8), ALL),
)
BENCH = (
    case((64, 197, 768), "residual bias prenorm", torch.bfloat16, torch.bfloat16),
    case((64, 197, 768), "residual bias prenorm", torch.bfloat16),
    case((64, 197, 768), "residual bias prenorm"),
    case((64, 197, 768), "residual bias scale rows prenorm", torch.bfloat16, torch.bfloat16),
)
