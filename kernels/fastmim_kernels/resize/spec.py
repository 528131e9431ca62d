"""Cases of the resized crop: enlarged, shrunk and fractional boxes, both filters, strided and low-precision images."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import MEAN, STD


def case(
    shape: tuple[int, ...],
    size: tuple[int, int],
    interpolation: str = "bicubic",
    source: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    is_fractional: bool = False,
    is_normalized: bool = False,
    is_strided: bool = False,
) -> Case:
    batch, channels, height, width = shape

    def make(device: torch.device) -> Inputs:
        g = generator(15)
        images = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        # Each side between a fifth of the image and all of it.
        share = 0.2 + 0.8 * torch.rand((batch, 2), generator=g)
        sides = share * torch.tensor([width, height])
        corner = torch.rand((batch, 2), generator=g) * (torch.tensor([width, height]) - sides)
        boxes = torch.cat([corner, sides], 1) if is_fractional else torch.cat([corner, sides.ceil()], 1).long()
        boxes[:, 2:] = torch.minimum(boxes[:, 2:], torch.tensor([width, height]) - boxes[:, :2])
        images = images if source == torch.uint8 else (images / 255).to(source)
        if is_strided:
            images = images.to(memory_format=torch.channels_last)
        return {
            "images": images.to(device),
            "boxes": boxes.to(device),
            "size": size,
            "interpolation": interpolation,
            "flip": (torch.arange(batch) % 2 == 1).to(device),
            "mean": MEAN[:channels] if is_normalized else None,
            "std": STD[:channels] if is_normalized else None,
            "dtype": dtype,
        }

    flags = "_fractional" * is_fractional + "_norm" * is_normalized + "_strided" * is_strided
    name = (
        f"{'x'.join(map(str, shape))}_{str(source)[6:]}_to{size[0]}x{size[1]}_{interpolation}{flags}_{str(dtype)[6:]}"
    )
    # One level, where rounding goes the other way; without rounding, that of float32 sums or of the result.
    level = 1.01 / 255 / (min(STD) if is_normalized else 1)
    tolerance = level if source == torch.uint8 else 1e-5
    if dtype in (torch.bfloat16, torch.float16):
        tolerance += 8e-3
    elif dtype == torch.uint8:
        tolerance = 1.0
    # The share of the image that the mean box covers, and the result.
    moved = batch * channels * (height * width * source.itemsize * 9 // 25 + size[0] * size[1] * dtype.itemsize)
    return Case(name, "random_resized_crop", make, tolerance, bytes_moved=moved)


CASES = (
    case((3, 3, 37, 29), (17, 23), dtype=torch.uint8),
    case((3, 3, 37, 29), (17, 23), source=torch.float32, is_normalized=True),
    case((2, 1, 20, 33), (40, 9), "bilinear", source=torch.float32, is_fractional=True, is_strided=True),
    case((2, 3, 20, 33), (15, 15), "bilinear", is_normalized=True, dtype=torch.bfloat16),
    case((2, 4, 31, 31), (7, 5), is_fractional=True, is_strided=True),
    case((1, 3, 1, 1), (3, 2)),
    case((0, 3, 8, 8), (4, 4)),
)
BENCH = (
    case((64, 3, 320, 320), (224, 224), dtype=torch.uint8),
    case((64, 3, 320, 320), (224, 224), is_normalized=True, dtype=torch.bfloat16),
)
