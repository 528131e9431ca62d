"""Pixels of chosen patches, read straight from uint8 master images: flip, window, normalize, patchify, gather."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_float_dtype, check_ids, check_images, check_patches
from ..registration import define

__all__ = ["patchify_gather"]


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
    """Cut a window out of each (flipped) image, divide it into patches, and return the patches ``ids`` as rows of
    values.

    A row holds V = patch_size**2 * C values ordered (row in patch, column in patch, channel), channel fastest. Computed
    in float32 (float64 for float64 images or dtype) and rounded once to ``dtype``. In plain torch, for one image x:
    ``x = x.flip(-1) if flip``; ``x = x[:, top:top + h, left:left + w] / 255``; ``x = (x - mean) / std``; then
    ``x.view(C, h/p, p, w/p, p).permute(1, 3, 2, 4, 0).reshape(L, V)[ids]``.

    Args:
        images: (B, C, H, W) uint8 in 0..255, or floats in 0..1; any strides.
        ids: (B, K) int64 patch indices in raster order of the window, or None for all L.
        patch_size: side of a patch in pixels; divides both sides of the window.
        mean, std: C floats each in 0..1 units, or None for no normalization.
        size: (h, w) of the window in pixels; None = the whole image.
        offset: (B, 2) int64 (top, left) of the window in the flipped image; None = (0, 0).
        flip: (B,) bool, True = mirror the whole master image left-right before the window is cut; None = no flip.
        dtype: floating dtype of the result.

    Returns: (B, K, V) of ``dtype``. Images that require a gradient are left to the reference, which has one.
    Raises: ValueError, TypeError or IndexError for arguments that do not fit each other. Values of ids and offset are
        checked on the CPU only.
    Source: facebookresearch/mae models_mae.py ``patchify`` (nhwpqc: the same value order).
    """
    h, w = check_images(images, size, offset, flip, mean, std)
    count = check_patches(h, w, patch_size)
    if ids is not None:
        check_ids("ids", ids, images.shape[0], count, images.device)
    check_float_dtype(dtype)
    needs_grad = images.requires_grad and torch.is_grad_enabled()
    if needs_grad or dispatch.uses_reference("patches", images.device, images, dtype):
        return dispatch.reference("patches").patchify_gather(
            images, ids, patch_size, mean=mean, std=std, size=(h, w), offset=offset, flip=flip, dtype=dtype
        )
    return PATCHIFY(images.detach(), ids, patch_size, mean, std, (h, w), offset, flip, dtype)


def allocate(images, ids, patch_size, mean, std, size, offset, flip, dtype) -> Tensor:
    count = size[0] // patch_size * (size[1] // patch_size) if ids is None else ids.shape[1]
    return images.new_empty((images.shape[0], count, patch_size * patch_size * images.shape[1]), dtype=dtype)


PATCHIFY = define(
    "patches",
    "patchify_gather(Tensor images, Tensor? ids, int patch_size, float[]? mean, float[]? std, SymInt[] size,"
    " Tensor? offset, Tensor? flip, ScalarType dtype) -> Tensor",
    allocate,
)
