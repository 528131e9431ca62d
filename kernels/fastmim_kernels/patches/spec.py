"""Cases of the patch gather: uint8 and float images, square or not, with and without window and normalization."""

import torch

from ..cases import Case, Inputs, generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    values = torch.randint(0, 256, shape, generator=generator(1), dtype=torch.uint8)
    return (values if dtype == torch.uint8 else (values / 255).to(dtype)).to(device)


def window(shape: tuple[int, ...], size: tuple[int, int], device: torch.device) -> Inputs:
    """A window at a random offset of each image, every other image flipped."""
    g = generator(2)
    batch, _, height, width = shape
    top = torch.randint(0, height - size[0] + 1, (batch,), generator=g)
    left = torch.randint(0, width - size[1] + 1, (batch,), generator=g)
    return {
        "size": size,
        "offset": torch.stack([top, left], 1).to(device),
        "flip": (torch.arange(batch) % 2 == 0).to(device),
    }


def chosen_ids(batch: int, patches: int, count: int, device: torch.device) -> torch.Tensor:
    keys = torch.rand((batch, patches), generator=generator(3))
    return keys.argsort(1)[:, :count].to(device)


def case(
    shape: tuple[int, ...],
    patch: int,
    size: tuple[int, int] | None = None,
    keep: int | None = None,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
    source: torch.dtype = torch.uint8,
) -> Case:
    h, w = size or shape[2:]
    patches = (h // patch) * (w // patch)

    def make(device: torch.device) -> Inputs:
        ids = None if keep is None else chosen_ids(shape[0], patches, keep, device)
        named = {"mean": MEAN[: shape[1]], "std": STD[: shape[1]]} if norm else {}
        cut = {} if size is None else window(shape, size, device)
        return {
            "images": pixels(shape, device, source),
            "ids": ids,
            "patch_size": patch,
            "dtype": dtype,
            **named,
            **cut,
        }

    values = shape[0] * (patches if keep is None else keep) * patch * patch * shape[1]
    name = f"{'x'.join(map(str, shape))}_{str(source)[6:]}_p{patch}_K{keep}_size{h}x{w}_{str(dtype)[6:]}"
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    return Case(
        name,
        "patchify_gather",
        make,
        tolerance,
        bytes_moved=values * (source.itemsize + dtype.itemsize),
        flops=2 * values,
    )


CASES = (
    case((3, 3, 56, 40), 8, (32, 24), keep=5),
    case((2, 3, 32, 48), 16),
    case((2, 1, 21, 14), 7, norm=False),
    case((2, 3, 21, 35), 7, (14, 21), keep=6, dtype=torch.bfloat16),
    case((2, 3, 24, 24), 8, (16, 16), keep=1, source=torch.float32),
    case((1, 3, 8, 8), 8, keep=1, source=torch.float16, norm=False),
    case((0, 3, 16, 16), 8, keep=2),
    case((2, 3, 16, 16), 8, keep=0),
)
BENCH = (
    case((64, 3, 256, 256), 16, (224, 224), keep=49, dtype=torch.bfloat16),
    case((64, 3, 256, 256), 16, (224, 224)),
    case((128, 3, 80, 80), 8, (64, 64), keep=16),
)
