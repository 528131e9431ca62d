"""Mixtures of images: which image supplies which patch, their pixels in one input, and the way back.

A group is `members` consecutive images of a batch; each group becomes one mixture. ``src[g, l]`` is the member, 0..M-1,
whose patch stands at position l of mixture g: positions are kept, so each grid cell appears once.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    MAX_PATCHES,
    check_float_dtype,
    check_images,
    check_integer,
    check_like,
    check_patches,
    check_rank,
    check_rng,
    fail,
    is_float,
    is_readable,
)
from ..masks import MAX_COUNTED
from ..registration import define

__all__ = ["mix_patches", "partition", "unmix_tokens"]


def partition(rng: Tensor, ids: Tensor, num_patches: int, members: int) -> Tensor:
    """Divide the positions of each group among its members, uniformly at random and as evenly as can be.

    The drawn order sorts the positions by (random word of Stream.MIX, position): keys are unique, so every device gives
    the same order. Place p of that order goes to member p % members; where members does not divide num_patches, the
    first members get one position more.

    Args:
        rng: (2,) int64 = [seed, step]. ids: (G,) int64, the id of each group's first sample, on the same device.
        num_patches: L, 1..2**20. members: M, 1..L.

    Returns: src, (G, L) int64 in 0..M-1.
    Raises: ValueError for counts out of range; as ``uniform`` for rng and ids.
    Source: MixedAE, arXiv 2303.17152 (patches of several images in one input); equal shares are our choice.
    """
    check_rng(rng, ids)
    check_integer("num_patches", num_patches)
    check_integer("members", members)
    if not 1 <= num_patches <= MAX_PATCHES:
        raise fail("num_patches", f"1..{MAX_PATCHES}", num_patches, "use larger patches")
    if not 1 <= members <= num_patches:
        raise fail("members", f"1..{num_patches}, at least one patch each", members, "mix fewer images")
    is_sorted = ids.device.type == "cuda" and num_patches > MAX_COUNTED
    if is_sorted or dispatch.uses_reference("mixing", ids.device):
        return dispatch.reference("mixing").partition(rng, ids, num_patches, members)
    return PARTITION(rng, ids, num_patches, members)


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
    """Take patch l of mixture g from image ``g * members + src[g, l]``; no other pixel is read.

    In plain torch: ``x = patchify_gather(images, None, patch_size, ...).view(G, members, L, V)``;
    ``x[arange(G)[:, None], src, arange(L)]``. Same values, same order of values in a row.

    Args:
        images: (G * members, C, H, W) uint8 in 0..255, or floats in 0..1; any strides.
        src: (G, L) int64 in 0..members-1; L patches of the window in raster order.
        patch_size, mean, std, size, offset, flip, dtype: as ``patchify_gather``, one window per image.

    Returns: (G, L, V) of ``dtype``.
    Raises: ValueError, TypeError or IndexError for arguments that do not fit each other. Values of src and offset are
        checked on the CPU only.
    Source: MixedAE, arXiv 2303.17152.
    """
    h, w = check_images(images, size, offset, flip, mean, std)
    count = check_patches(h, w, patch_size)
    check_integer("members", members)
    if members < 1 or images.shape[0] % members:
        raise fail("images", f"a multiple of members = {members} images", images.shape[0], "change the batch size")
    _check_src(src, members, (images.shape[0] // members, count), images.device)
    check_float_dtype(dtype)
    needs_grad = images.requires_grad and torch.is_grad_enabled()
    if needs_grad or dispatch.uses_reference("mixing", images.device, images, dtype):
        return dispatch.reference("mixing").mix_patches(
            images, src, patch_size, members, mean=mean, std=std, size=(h, w), offset=offset, flip=flip, dtype=dtype
        )
    return MIX(images.detach(), src, patch_size, members, mean, std, (h, w), offset, flip, dtype)


def unmix_tokens(
    tokens: Tensor, mask_token: Tensor, position: Tensor, src: Tensor, members: int, num_prefix: int = 1
) -> Tensor:
    """Split each mixture into its images: own tokens in place, ``mask_token`` elsewhere, ``position`` added.

    In plain torch, for member j of mixture g: ``own = where((src[g] == j)[:, None], tokens[g, P:], mask_token)``;
    ``cat([tokens[g, :P], own]) + position``. Every member gets a copy of the prefix tokens. Added in float32 or wider,
    rounded once.

    Args:
        tokens: (G, P + L, D) floats: prefix tokens, then the tokens of the patches in raster order.
        mask_token: (D,). position: (P + L, D), rows of the prefix tokens first.
        src: (G, L) int64 in 0..members-1.
        num_prefix: P, 0 or more.

    Returns: (G * members, P + L, D) in the dtype that tokens, mask_token and position promote to. Differentiable with
        respect to those three.
    Raises: ValueError, TypeError or IndexError for arguments that do not fit each other.
    Source: MixedAE, arXiv 2303.17152; facebookresearch/mae models_mae.py ``forward_decoder``.
    """
    check_rank("tokens", tokens, "(G, P + L, D)")
    check_rank("mask_token", mask_token, "(D,)")
    check_rank("position", position, "(P + L, D)")
    groups, length, width = tokens.shape
    check_integer("num_prefix", num_prefix)
    check_integer("members", members)
    if not 0 <= num_prefix <= length:
        raise fail("num_prefix", f"0..{length}, the tokens of a mixture", num_prefix, "correct num_prefix")
    if members < 1:
        raise fail("members", "at least 1", members, "pass the number of images in a mixture")
    _check_src(src, members, (groups, length - num_prefix), tokens.device)
    named = {"tokens": tokens, "mask_token": mask_token, "position": position}
    for (name, tensor), shape in zip(named.items(), (tokens.shape, (width,), (length, width)), strict=True):
        if tuple(tensor.shape) != tuple(shape):
            raise fail(name, f"shape {shape}", tuple(tensor.shape), "give it the sizes of tokens")
        if tensor.device != tokens.device or not is_float(tensor):
            got = f"{tensor.dtype} on {tensor.device}"
            raise fail(name, f"floats on {tokens.device} like tokens", got, "move or convert it", TypeError)
    if dispatch.uses_reference("mixing", tokens.device, tokens, mask_token, position):
        return dispatch.reference("mixing").unmix_tokens(tokens, mask_token, position, src, members, num_prefix)
    return UNMIX(tokens, mask_token, position, src, members, num_prefix)


def _check_src(src: Tensor, members: int, shape: tuple[int, int], device: torch.device) -> None:
    check_rank("src", src, "(G, L)")
    if tuple(src.shape) != shape:
        raise fail("src", f"shape {shape}, one row per mixture", tuple(src.shape), "give a member for every patch")
    check_like("src", src, shape, torch.int64, device)
    if is_readable(src) and src.numel():
        low, high = (int(v) for v in src.aminmax())
        if low < 0 or high >= members:
            raise fail("src", f"members in 0..{members - 1}", f"{low}..{high}", "draw it with partition", IndexError)


def allocate_partition(rng: Tensor, ids: Tensor, num_patches: int, members: int) -> Tensor:
    return ids.new_empty((ids.shape[0], num_patches))


def allocate_mix(images, src, patch_size, members, mean, std, size, offset, flip, dtype) -> Tensor:
    return images.new_empty((*src.shape, patch_size * patch_size * images.shape[1]), dtype=dtype)


def allocate_unmix(tokens, mask_token, position, src, members: int, num_prefix: int) -> Tensor:
    groups, total, width = tokens.shape
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), position.dtype)
    return tokens.new_empty((groups * members, total, width), dtype=dtype)


def allocate_unmix_backward(
    grad: Tensor, src: Tensor, members: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of tokens, mask_token and position, empty where they are not wanted."""
    _, total, width = grad.shape
    shapes = (src.shape[0], total, width), (width,), (total, width)
    dtypes = dtype, torch.float32, torch.float32
    return tuple(grad.new_empty(s if w else (0,), dtype=d) for s, w, d in zip(shapes, wanted, dtypes, strict=True))


def _save_unmix(ctx, inputs, output) -> None:
    tokens, mask_token, position, src, ctx.members, ctx.num_prefix = inputs
    ctx.save_for_backward(src)
    ctx.dtypes = tokens.dtype, mask_token.dtype, position.dtype


def _backward_unmix(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = UNMIX_BACKWARD(grad, *ctx.saved_tensors, ctx.members, ctx.num_prefix, ctx.dtypes[0], wanted)
    return *(g.to(d) if w else None for g, d, w in zip(grads, ctx.dtypes, wanted, strict=True)), None, None, None


PARTITION = define(
    "mixing",
    "partition(Tensor rng, Tensor ids, SymInt num_patches, SymInt members) -> Tensor",
    allocate_partition,
)
MIX = define(
    "mixing",
    "mix_patches(Tensor images, Tensor src, int patch_size, SymInt members, float[]? mean, float[]? std,"
    " SymInt[] size, Tensor? offset, Tensor? flip, ScalarType dtype) -> Tensor",
    allocate_mix,
)
UNMIX_BACKWARD = define(
    "mixing",
    "unmix_tokens_backward(Tensor grad, Tensor src, SymInt members, SymInt num_prefix, ScalarType dtype,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)",
    allocate_unmix_backward,
)
UNMIX = define(
    "mixing",
    "unmix_tokens(Tensor tokens, Tensor mask_token, Tensor position, Tensor src, SymInt members, SymInt num_prefix)"
    " -> Tensor",
    allocate_unmix,
    save=_save_unmix,
    backward=_backward_unmix,
)
