"""Argument checks that several ops share. Each raises before any work starts and says what to do.

Checks look at shapes, dtypes and devices. Values are looked at on the CPU only: on a GPU that would make the host wait.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def fail(what: str, expected: str, got: object, fix: str, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise, in the one form that all messages have."""
    return error(f"{what}: expected {expected}, got {got}; {fix}.")


def check_rank(name: str, tensor: Tensor, layout: str) -> None:
    """``tensor`` must have as many dimensions as ``layout`` names, e.g. "(B, L, D)"."""
    if not isinstance(tensor, Tensor):
        raise fail(name, f"a tensor {layout}", type(tensor).__name__, "pass a tensor", TypeError)
    if tensor.ndim != layout.count(",") + (not layout.endswith(",)")):
        raise fail(name, f"shape {layout}", tuple(tensor.shape), "reshape it")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """``tensor`` must have exactly this shape, dtype and device."""
    if not isinstance(tensor, Tensor):
        raise fail(name, f"a {dtype} tensor of shape {shape}", type(tensor).__name__, "pass a tensor", TypeError)
    if tuple(tensor.shape) != shape:
        raise fail(name, f"shape {shape}", tuple(tensor.shape), "one row per image of the batch")
    if tensor.dtype != dtype:
        raise fail(name, str(dtype), tensor.dtype, f"convert it with .to({dtype})", TypeError)
    if tensor.device != device:
        raise fail(name, f"a tensor on {device}", tensor.device, "move it to the device of the other arguments")


def check_ids(name: str, ids: Tensor, batch: int, count: int, device: torch.device) -> None:
    """Patch ids: (batch, K) int64 on ``device``, with values in 0..count-1 (values are checked on the CPU only)."""
    check_rank(name, ids, "(B, K)")
    check_like(name, ids, (batch, ids.shape[1]), torch.int64, device)
    if is_readable(ids) and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= count:
            raise fail(
                name,
                f"patch ids in 0..{count - 1}",
                f"{low}..{high}",
                "ids count patches only, not prefix tokens",
                IndexError,
            )


def is_readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs nothing: on the CPU, outside torch.compile, and where there are any."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or isinstance(tensor, FakeTensor))


def check_rng(rng: Tensor, ids: Tensor) -> None:
    """``rng``: (2,) int64 = [seed, step]; ``ids``: (B,) int64 sample ids, on one device."""
    check_rank("ids", ids, "(B,)")
    check_like("ids", ids, tuple(ids.shape), torch.int64, ids.device)
    if not isinstance(rng, Tensor) or tuple(rng.shape) != (2,) or rng.dtype != torch.int64:
        got = f"{rng.dtype} {tuple(rng.shape)}" if isinstance(rng, Tensor) else type(rng).__name__
        raise fail("rng", "an int64 tensor (2,) = [seed, step]", got, "pass torch.tensor([seed, step])", TypeError)
    if rng.device != ids.device:
        raise fail(
            "rng", f"a tensor on {ids.device} like ids", rng.device, "keep [seed, step] on the device of the batch"
        )


def check_tensors(name: str, tensors: Sequence[Tensor], count: int) -> None:
    """``tensors`` must be a list of ``count`` tensors."""
    if not isinstance(tensors, (list, tuple)):
        raise fail(name, "a list of tensors", type(tensors).__name__, "pass a list", TypeError)
    if len(tensors) != count:
        raise fail(name, f"{count} tensors", len(tensors), "give one for each of the others")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise fail(f"{name}[{i}]", "a tensor", type(tensor).__name__, "leave it out of all lists", TypeError)


def check_integer(name: str, *values: int) -> None:
    """Each of ``values`` must be an integer, which its range can be checked of afterwards."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise fail(name, "an integer", repr(value), "pass an int", TypeError)


def check_number(name: str, value: float) -> None:
    """``value`` must be a number."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise fail(name, "a number", repr(value), "pass a float", TypeError)


def check_pair(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    """``pair`` must be two integers (rows, columns), and is returned."""
    if not isinstance(pair, (tuple, list, torch.Size)) or len(pair) != 2:
        raise fail(name, "two integers (rows, columns)", repr(pair), "pass a tuple of two", TypeError)
    check_integer(name, *pair)
    return pair[0], pair[1]


def check_float_dtype(dtype: torch.dtype) -> None:
    """``dtype`` of a result must be a floating one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise fail("dtype", "a floating dtype", repr(dtype), "use torch.float32 or torch.bfloat16", TypeError)


def check_constants(mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int) -> None:
    """``mean`` and ``std``: both None, or one number per channel each, std above 0."""
    if mean is None and std is None:
        return
    expected, got = f"{channels} numbers each, std > 0, or None for both", f"mean={mean}, std={std}"
    for values in (mean, std):
        if not isinstance(values, (tuple, list)) or len(values) != channels:
            raise fail("mean, std", expected, got, "give one per channel, in 0..1 units")
        for value in values:
            check_number("mean, std", value)
    if min(std) <= 0:
        raise fail("mean, std", expected, got, "give one per channel, in 0..1 units")


def check_images(
    images: Tensor,
    size: tuple[int, int] | None,
    offset: Tensor | None,
    flip: Tensor | None,
    mean: tuple | None,
    std: tuple | None,
) -> tuple[int, int]:
    """Check a batch of master images and the window in them. Returns (h, w), the size of the window in pixels."""
    check_rank("images", images, "(B, C, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise fail("images", "uint8 in 0..255 or floats in 0..1", images.dtype, "convert the images", TypeError)
    batch, channels, height, width = images.shape
    h, w = (height, width) if size is None else check_pair("size", size)
    if not (1 <= h <= height and 1 <= w <= width):
        raise fail(
            "size",
            f"a window (h, w) inside the {height}x{width} images",
            (h, w),
            "give a smaller size or larger images",
        )
    if offset is not None:
        check_like("offset", offset, (batch, 2), torch.int64, images.device)
        if is_readable(offset) and batch:
            low, high = offset.amin(0).tolist(), offset.amax(0).tolist()
            if min(low) < 0 or high[0] > height - h or high[1] > width - w:
                expected = f"(top, left) in 0..{height - h}, 0..{width - w}"
                raise fail("offset", expected, f"{low}..{high}", "draw it inside the master image")
    if flip is not None:
        check_like("flip", flip, (batch,), torch.bool, images.device)
    check_constants(mean, std, channels)
    return h, w


def check_patches(h: int, w: int, patch_size: int) -> int:
    """The number of patches of an (h, w) image; ``patch_size`` must divide both sides."""
    check_integer("patch_size", patch_size)
    if patch_size < 1 or h % patch_size or w % patch_size:
        raise fail("patch_size", f"a divisor of the image sides {h}x{w}", patch_size, "change patch_size or size")
    return (h // patch_size) * (w // patch_size)


def check_positive(name: str, value: float) -> None:
    """``value`` must be finite and above 0."""
    check_number(name, value)
    # Not math.isfinite, which torch.compile cannot trace where a float is dynamic.
    if not 0 < value < math.inf:
        raise fail(name, "a finite number above 0", value, f"correct {name}")
