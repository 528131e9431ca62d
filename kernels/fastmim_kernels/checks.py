"""Argument checks that several ops share. Each raises before any work starts and says what to do.

Checks look at shapes, dtypes and devices. Values are looked at on the CPU only: on a GPU that would make the host wait.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Floats that torch computes with.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = (1 << 63) - 1
# A patch index has 20 bits in the sort key of a mask, beside the 32 bits of the random word.
MAX_PATCHES = 1 << 20


def fail(what: str, expected: str, got: object, fix: str, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise, in the one form that all messages have."""
    return error(f"{what}: expected {expected}, got {got if isinstance(got, str) else shown(got)}; {fix}.")


def shown(value: object) -> str:
    """A value in a message: one line, however long it is."""
    if isinstance(value, Tensor):
        return describe(value)
    text = " ".join((str(value) if isinstance(value, torch.device) else repr(value)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_float(value: object) -> bool:
    """Whether this is a tensor of floats that torch computes with, or such a dtype: not complex, not of eight bits."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return isinstance(dtype, torch.dtype) and dtype in FLOATS


def describe(value: object) -> str:
    """Dtype and shape of a tensor, or the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(name: str, tensor: Any, expected: str = "a tensor") -> None:
    """``tensor`` must be a tensor whose values lie in memory, at strides: neither sparse nor nested."""
    if not isinstance(tensor, Tensor):
        raise fail(name, expected, type(tensor).__name__, "pass a tensor", TypeError)
    # A nested tensor says that its layout is a strided one, and has no shape.
    if tensor.is_nested or tensor.layout != torch.strided:
        got = "a nested one" if tensor.is_nested else tensor.layout
        raise fail(
            name, f"{expected}, of layout torch.strided", got, "convert it with .to_dense() or pad it", TypeError
        )


def check_rank(name: str, tensor: Tensor, layout: str) -> None:
    """``tensor`` must have as many dimensions as ``layout`` names, e.g. "(B, L, D)"."""
    check_tensor(name, tensor, f"a tensor {layout}")
    if tensor.ndim != layout.count(",") + (not layout.endswith(",)")):
        raise fail(name, f"shape {layout}", tuple(tensor.shape), "reshape it")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """``tensor`` must have exactly this shape, dtype and device."""
    check_tensor(name, tensor, f"a {dtype} tensor of shape {shape}")
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
    """Whether looking at the values costs nothing: on the CPU, outside torch.compile and vmap, and where there are any."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not (isinstance(tensor, FakeTensor) or torch._C._functorch.is_batchedtensor(tensor))


def check_rng(rng: Tensor, ids: Tensor) -> None:
    """``rng``: (2,) int64 = [seed, step]; ``ids``: (B,) int64 sample ids, on one device."""
    check_rank("ids", ids, "(B,)")
    check_like("ids", ids, tuple(ids.shape), torch.int64, ids.device)
    expected = "an int64 tensor (2,) = [seed, step]"
    check_tensor("rng", rng, expected)
    if tuple(rng.shape) != (2,) or rng.dtype != torch.int64:
        raise fail("rng", expected, describe(rng), "pass torch.tensor([seed, step])", TypeError)
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
        check_tensor(f"{name}[{i}]", tensor)


def check_written(name: str, tensor: Tensor) -> None:
    """``tensor``, which is updated in place, must have a place in memory for each of its values."""
    if not tensor.is_contiguous() and any(
        size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride())
    ):
        raise fail(name, "values of their own to update", "a tensor made by expand()", "clone it first")
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise fail(name, "values to update", "a view that negates those in memory", "clone it first")


def check_integer(name: str, *values: int) -> None:
    """Each of ``values`` must be an integer of 64 bits, which its range can be checked of afterwards."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise fail(name, "an integer", shown(value), "pass an int", TypeError)
        if not -LARGEST <= value <= LARGEST:
            raise fail(name, "an integer of 64 bits", f"one of {value.bit_length()} bits", "correct it")


def check_number(name: str, value: float) -> None:
    """``value`` must be a number, as an integer one of 64 bits."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise fail(name, "a number", shown(value), "pass a float", TypeError)
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise fail(name, "a number of 64 bits", f"an integer of {value.bit_length()} bits", "pass a float")


def check_scalar(name: str, value: float | Tensor, device: torch.device) -> None:
    """``value`` must be a number, or a tensor of one real number on ``device``."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return
    check_tensor(name, value)
    if value.ndim or value.device != device or not (is_float(value) or value.dtype in (torch.int32, torch.int64)):
        expected, got = f"a number or a 0-dimensional tensor on {device}", f"{describe(value)} on {value.device}"
        raise fail(name, expected, got, "convert or move it")


def check_pair(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    """``pair`` must be two integers (rows, columns), and is returned."""
    if not isinstance(pair, (tuple, list, torch.Size)) or len(pair) != 2:
        raise fail(name, "two integers (rows, columns)", shown(pair), "pass a tuple of two", TypeError)
    check_integer(name, *pair)
    return pair[0], pair[1]


def check_grid(name: str, grid: tuple[int, int]) -> tuple[int, int]:
    """``grid`` must be (rows, columns) of 1 to MAX_PATCHES patches, and is returned."""
    h, w = check_pair(name, grid)
    if h < 1 or w < 1 or h * w > MAX_PATCHES:
        raise fail(name, f"at least 1x1 and at most {MAX_PATCHES} patches", f"{h}x{w}", "correct the grid")
    return h, w


def check_distinct(name: str, ids: Tensor, count: int) -> None:
    """No image may have a patch twice among its ``ids`` (B, K) in 0..count-1 (looked at on the CPU only)."""
    if is_readable(ids) and ids.numel():
        seen = torch.zeros((ids.shape[0], count), dtype=torch.bool).scatter_(1, ids, True)
        if int(seen.sum()) < ids.numel():
            raise fail(name, "each patch at most once per image", "one twice", "draw ids without replacement")


def check_flag(name: str, value: bool) -> None:
    """``value`` must be True or False."""
    if not isinstance(value, bool):
        raise fail(name, "True or False", value, "pass a bool", TypeError)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` must be one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise fail(name, f"one of {', '.join(choices)}", shown(value), f"correct {name}")


def check_float_dtype(dtype: torch.dtype) -> None:
    """``dtype`` of a result must be a floating one."""
    if isinstance(dtype, Tensor) or not is_float(dtype):
        raise fail("dtype", "a floating dtype", shown(dtype), "use torch.float32 or torch.bfloat16", TypeError)


def check_constants(mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int) -> None:
    """``mean`` and ``std``: both None, or one number per channel each, std above 0."""
    if mean is None and std is None:
        return
    is_fit = all(isinstance(values, (tuple, list)) and len(values) == channels for values in (mean, std))
    for value in (*mean, *std) if is_fit else ():
        check_number("mean, std", value)
    if not is_fit or not all(value > 0 for value in std):
        expected, got = f"{channels} numbers each, std > 0, or None for both", f"mean={shown(mean)}, std={shown(std)}"
        raise fail("mean, std", expected, got, "give one per channel, in 0..1 units")


def check_pixels(images: Tensor) -> None:
    """``images`` must have a dtype of pixels and at least one channel."""
    if images.dtype != torch.uint8 and not is_float(images):
        raise fail("images", "uint8 in 0..255 or floats in 0..1", images.dtype, "convert the images", TypeError)
    if images.shape[1] == 0:
        raise fail("images", "at least one channel", tuple(images.shape), "give (B, C, H, W)")


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
    check_pixels(images)
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
