"""Cases of mixing: shares that are equal or not, one member, no image, windows, prefix tokens, mixed dtypes."""

import torch

from ..cases import Case, Inputs, generator
from ..patches.spec import MEAN, STD, pixels, window


def members_of_patches(groups: int, patches: int, members: int, device: torch.device) -> torch.Tensor:
    """Any src, not only those that ``partition`` draws: shares may be unequal."""
    return torch.randint(0, members, (groups, patches), generator=generator(8)).to(device)


def partition_case(groups: int, patches: int, members: int) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "rng": torch.tensor([(5 << 32) + 7, 11], device=device),
            "ids": torch.arange(groups, device=device) * 1_000_003 + 5,
            "num_patches": patches,
            "members": members,
        }

    return Case(f"G{groups}_L{patches}_M{members}", "partition", make, bytes_moved=groups * (8 + 8 * patches))


def mix_case(
    shape: tuple[int, ...],
    patch: int,
    members: int,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    source: torch.dtype = torch.uint8,
) -> Case:
    h, w = size or shape[2:]
    groups, patches = shape[0] // members, (h // patch) * (w // patch)

    def make(device: torch.device) -> Inputs:
        return {
            "images": pixels(shape, device, source),
            "src": members_of_patches(groups, patches, members, device),
            "patch_size": patch,
            "members": members,
            "mean": MEAN[: shape[1]],
            "std": STD[: shape[1]],
            "dtype": dtype,
            **({} if size is None else window(shape, size, device)),
        }

    values = groups * patches * patch * patch * shape[1]
    name = f"{'x'.join(map(str, shape))}_{str(source)[6:]}_p{patch}_M{members}_size{h}x{w}_{str(dtype)[6:]}"
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
    moved = values * (source.itemsize + dtype.itemsize) + groups * patches * 8
    return Case(name, "mix_patches", make, tolerance, bytes_moved=moved, flops=2 * values)


def unmix_case(
    groups: int,
    patches: int,
    members: int,
    width: int,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype = torch.float32,
    is_strided: bool = False,
) -> Case:
    def make(device: torch.device) -> Inputs:
        g = generator(9)
        x = torch.randn((groups, prefix + patches, 2 * width), generator=g).to(device, dtype)
        return {
            "tokens": x[:, :, ::2] if is_strided else x[:, :, :width].contiguous(),
            "mask_token": torch.randn((width,), generator=g).to(device, parameters),
            "position": torch.randn((prefix + patches, width), generator=g).to(device, parameters),
            "src": members_of_patches(groups, patches, members, device),
            "members": members,
            "num_prefix": prefix,
        }

    result = torch.promote_types(dtype, parameters)
    dtypes = f"{str(dtype)[6:]}_{str(parameters)[6:]}"
    name = f"G{groups}_L{patches}_M{members}_P{prefix}_D{width}_{dtypes}{'_strided' * is_strided}"
    # A bfloat16 result or gradient is rounded once, by at most 2**-8 of its size; the truth sums many of them.
    tolerance = 4e-3 if torch.bfloat16 in (dtype, parameters) else 2e-6
    read, written = groups * (prefix + patches) * width, groups * members * (prefix + patches) * width
    moved = read * dtype.itemsize + written * result.itemsize + groups * patches * 8
    grads = ("tokens", "mask_token", "position")
    return Case(name, "unmix_tokens", make, tolerance, grads, bytes_moved=moved, flops=written)


CASES = (
    partition_case(3, 196, 4),
    partition_case(2, 197, 3),
    partition_case(2, 5, 5),
    partition_case(1, 1, 1),
    partition_case(0, 49, 4),
    mix_case((8, 3, 56, 40), 8, 4, (32, 24)),
    mix_case((6, 3, 21, 35), 7, 3, (14, 21), dtype=torch.bfloat16),
    mix_case((2, 1, 16, 24), 8, 1),
    mix_case((4, 3, 24, 24), 8, 2, (16, 16), source=torch.float32),
    mix_case((0, 3, 16, 16), 8, 4),
    unmix_case(3, 196, 4, 100),
    unmix_case(2, 49, 3, 64, dtype=torch.bfloat16),
    unmix_case(2, 49, 2, 64, dtype=torch.bfloat16, parameters=torch.bfloat16),
    unmix_case(2, 9, 4, 20, prefix=0, is_strided=True),
    unmix_case(2, 5, 2, 24, prefix=3),
    unmix_case(1, 1, 1, 5),
    unmix_case(0, 9, 3, 8),
)
BENCH = (
    partition_case(256, 196, 4),
    mix_case((64, 3, 224, 224), 16, 4, dtype=torch.bfloat16),
    unmix_case(16, 196, 4, 512),
    unmix_case(16, 196, 4, 512, dtype=torch.bfloat16),
)
