"""Cases of the views: every step alone, all together, images without color, odd sizes, low-precision results."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import MEAN, STD, pixels, window
from . import ColorJitter


def drawn_jitter(batch: int, device: torch.device) -> ColorJitter:
    """CMAE's amounts (.4, .4, .4, .1), applied to 4 images of 5."""
    g = generator(8)
    factors = [0.6 + 0.8 * torch.rand(batch, generator=g) for _ in range(3)]
    hue = 0.2 * torch.rand(batch, generator=g) - 0.1
    order = torch.rand((batch, 4), generator=g).argsort(1)
    return ColorJitter(*(t.to(device) for t in (torch.arange(batch) % 5 != 4, order, *factors, hue)))


def case(shape: tuple[int, ...], size: tuple[int, int], steps: str, dtype: torch.dtype = torch.float32) -> Case:
    """``steps``: any of "jitter grey blur norm"."""
    batch, channels = shape[:2]

    def make(device: torch.device) -> Inputs:
        named: Inputs = {"images": pixels(shape, device), "dtype": dtype, **window(shape, size, device)}
        if "jitter" in steps:
            named["jitter"] = drawn_jitter(batch, device)
        if "grey" in steps:
            named["grey"] = (torch.arange(batch) % 5 == 1).to(device)
        if "blur" in steps:
            sigma = 0.1 + 1.9 * torch.rand(batch, generator=generator(9))
            named["blur_sigma"] = torch.where(torch.arange(batch) % 2 == 1, sigma, 0.0).to(device)
        if "norm" in steps:
            named.update(mean=MEAN[:channels], std=STD[:channels])
        return named

    values = batch * channels * size[0] * size[1]
    name = f"{'x'.join(map(str, shape))}_to{size[0]}x{size[1]}_{steps.replace(' ', '+') or 'window'}_{str(dtype)[6:]}"
    # Divided by the standard deviation .22 an error of 1e-6 becomes 5e-6.
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
    # Per value: about 60 operations for the four color changes, 13 taps in two directions for the blur.
    flops = values * (2 + 60 * ("jitter" in steps) + 52 * ("blur" in steps))
    return Case(name, "shift_flip_jitter", make, tolerance, bytes_moved=values * (1 + dtype.itemsize), flops=flops)


CASES = (
    case((3, 3, 20, 24), (20, 24), ""),
    case((5, 3, 23, 29), (16, 19), "jitter grey blur norm"),
    case((5, 3, 23, 29), (16, 19), "jitter grey blur norm", torch.bfloat16),
    case((4, 3, 12, 12), (7, 5), "blur"),
    case((3, 1, 12, 14), (8, 8), "jitter grey norm"),
    case((0, 3, 12, 14), (8, 8), "jitter grey blur norm"),
)
ALL = "jitter grey blur norm"
BENCH = (
    case((128, 3, 80, 80), (64, 64), ALL),
    case((64, 3, 256, 256), (224, 224), ALL),
    case((64, 3, 256, 256), (224, 224), "norm"),
)
