"""Patches by one advanced index: no window, flipped copy or unwanted patch is ever materialized."""

import torch
from torch import Tensor


def constants(values: list[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A small tensor of Python numbers, made by fills: a CUDA graph cannot capture the host copy of torch.tensor()."""
    return torch.cat([torch.full((1,), value, dtype=dtype, device=like.device) for value in values])


def patchify_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | None = None,
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the public function."""
    batch, _, height, width = images.shape
    h, w = (height, width) if size is None else size
    columns = w // patch_size
    device = images.device
    if ids is None:
        ids = torch.arange(h // patch_size * columns, device=device).expand(batch, -1)
    inside = torch.arange(patch_size, device=device)
    top, left = (0, 0) if offset is None else (offset[:, :1], offset[:, 1:])
    rows = (top + ids // columns * patch_size)[:, :, None, None] + inside[:, None]  # (B, K, p, 1)
    cols = (left + ids % columns * patch_size)[:, :, None, None] + inside  # (B, K, 1, p)
    if flip is not None:
        cols = torch.where(flip[:, None, None, None], width - 1 - cols, cols)
    image = torch.arange(batch, device=device)[:, None, None, None]
    # A slice between index tensors puts the indexed dimensions first: (B, K, p, p, C), the order that we want.
    values = images[image, :, rows, cols].flatten(2)
    return normalize(values, mean, std, dtype)


def normalize(
    values: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, dtype: torch.dtype
) -> Tensor:
    """Scale values (..., V), channel fastest, to 0..1 if uint8; (x - mean) / std where given; round to ``dtype``."""
    work = torch.float64 if torch.float64 in (values.dtype, dtype) else torch.float32
    levels = 255.0 if values.dtype == torch.uint8 else 1.0
    if mean is None:
        return (values.to(work) / levels).to(dtype)
    repeats = values.shape[-1] // len(mean)
    shift = constants([m * levels for m in mean], values, work).repeat(repeats)
    scale = constants([1 / (s * levels) for s in std], values, work).repeat(repeats)
    return ((values - shift) * scale).to(dtype)
