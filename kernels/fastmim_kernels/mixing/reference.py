"""Mixing by one advanced index, unmixing by one write per row."""

import torch
from torch import Tensor

from ..masks.reference import INDEX_BITS
from ..patches.reference import normalize
from ..philox import Stream
from ..philox.reference import random_words


def partition(rng: Tensor, ids: Tensor, num_patches: int, members: int) -> Tensor:
    """See the public function."""
    positions = torch.arange(num_patches, device=ids.device)
    keys = random_words(rng, ids, Stream.MIX, num_patches) << INDEX_BITS | positions
    # The low bits of the sorted keys are the positions: no argsort, whose order of ties differs between devices.
    order = keys.sort(dim=1).values & ((1 << INDEX_BITS) - 1)
    return torch.empty_like(order).scatter_(1, order, (positions % members).expand_as(order))


def mix_patches(
    images: Tensor,
    src: Tensor,
    patch_size: int,
    members: int,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: tuple[int, int] | None = None,
    offset: Tensor | None = None,
    flip: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See the public function."""
    height, width = images.shape[2:]
    h, w = (height, width) if size is None else size
    columns = w // patch_size
    device = images.device
    image = torch.arange(0, images.shape[0], members, device=device)[:, None] + src  # (G, L)
    patch = torch.arange(h // patch_size * columns, device=device)
    inside = torch.arange(patch_size, device=device)
    # A window or a flip belongs to an image: `image` looks it up for each patch.
    top, left = (0, 0) if offset is None else offset[image].unbind(-1)
    rows = (top + patch // columns * patch_size).expand_as(src)[:, :, None, None] + inside[:, None]  # (G, L, p, 1)
    cols = (left + patch % columns * patch_size).expand_as(src)[:, :, None, None] + inside  # (G, L, 1, p)
    if flip is not None:
        cols = torch.where(flip[image][:, :, None, None], width - 1 - cols, cols)
    # A slice between index tensors puts the indexed dimensions first: (G, L, p, p, C), the order that we want.
    values = images[image[:, :, None, None], :, rows, cols].flatten(2)
    return normalize(values, mean, std, dtype)


def unmix_tokens(
    tokens: Tensor, mask_token: Tensor, position: Tensor, src: Tensor, members: int, num_prefix: int = 1
) -> Tensor:
    """See the public function."""
    groups, length, _ = tokens.shape
    device = tokens.device
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), position.dtype)
    work = torch.promote_types(dtype, torch.float32)
    mask_token, position = mask_token.to(work), position.to(work)
    placed = tokens.to(work) + position

    # Each token overwrites one row of one image, a prefix token one row of every image of its mixture.
    owner = torch.arange(members, device=device).repeat_interleave(num_prefix).expand(groups, -1)
    image = torch.arange(0, groups * members, members, device=device)[:, None] + torch.cat([owner, src], dim=1)
    row = torch.arange(length, device=device)
    row = torch.cat([row[:num_prefix].repeat(members), row[num_prefix:]])
    written = torch.cat([placed[:, :num_prefix].repeat(1, members, 1), placed[:, num_prefix:]], dim=1)

    unseen = torch.cat([position[:num_prefix], position[num_prefix:] + mask_token])
    return unseen.expand(groups * members, -1, -1).index_put((image, row.expand_as(image)), written).to(dtype)
