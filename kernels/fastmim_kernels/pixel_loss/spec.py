"""Cases of the reconstruction loss: every kind, normalized patches or not, windows, low-precision predictions."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import MEAN, STD, chosen_ids, pixels, window


def case(
    shape: tuple[int, ...],
    patch: int,
    masked: int,
    size: tuple[int, int] | None = None,
    norm: bool = True,
    kind: str = "mse",
    dtype: torch.dtype = torch.float32,
) -> Case:
    h, w = size or shape[2:]
    patches = (h // patch) * (w // patch)
    width = patch * patch * shape[1]
    values = shape[0] * masked * width

    def make(device: torch.device) -> Inputs:
        return {
            "pred": torch.randn((shape[0], masked, width), generator=generator(6)).to(device, dtype),
            "images": pixels(shape, device),
            "ids_masked": chosen_ids(shape[0], patches, masked, device),
            "patch_size": patch,
            "mean": MEAN[: shape[1]],
            "std": STD[: shape[1]],
            "norm": norm,
            "kind": kind,
            **({} if size is None else window(shape, size, device)),
        }

    name = f"{'x'.join(map(str, shape))}_p{patch}_M{masked}_{kind}{'_norm' * norm}_{str(dtype)[6:]}"
    # A gradient is rounded to the dtype of pred; the loss itself is float32.
    tolerance = 1e-4 if dtype == torch.bfloat16 else 2e-6
    return Case(
        name,
        "masked_pixel_loss",
        make,
        tolerance,
        ("pred",),
        bytes_moved=values * (1 + dtype.itemsize),
        flops=10 * values,
    )


CASES = (
    case((3, 3, 56, 40), 8, 9, (32, 24)),
    case((2, 3, 32, 48), 16, 6, norm=False, kind="l1"),
    case((2, 1, 21, 14), 7, 1, kind="smooth_l1"),
    case((2, 3, 21, 35), 7, 5, (14, 21), dtype=torch.bfloat16),
    case((1, 3, 8, 8), 8, 1),
)
BENCH = (
    case((64, 3, 256, 256), 16, 147, (224, 224)),
    case((64, 3, 256, 256), 16, 147, (224, 224), dtype=torch.bfloat16),
    case((128, 3, 80, 80), 8, 48, (64, 64)),
)
