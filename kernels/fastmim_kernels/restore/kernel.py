"""Decoder input in Triton.

Forward: one pass over the rows of the result. Backward: one pass over the rows of its gradient, in which every gradient
row is read once: rows of visible tokens go to their place in the gradient of x (ids_restore is a permutation, so each
place is written once), rows of masked patches are added up for the mask token, all rows for the positions. Sums over
images are made in two stages of fixed order, so that they repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, row_config
from ..tuning import tuned
from . import allocate, allocate_backward


@triton.jit
def restore_kernel(
    x_ptr, mask_token_ptr, pos_ptr, ids_ptr, out_ptr, length, keep, prefix, width,
    stride_b, stride_n, stride_d, stride_pos,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (image, ROWS of its prefix + length rows, block of columns)."""
    total = prefix + length
    tiles = tl.cdiv(total, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < width)[None, :]

    is_patch = (rows >= prefix) & (rows < total)
    place = tl.load(ids_ptr + image * length + rows - prefix, mask=is_patch, other=0)
    is_masked = is_patch & (place >= keep)
    token = tl.where(is_patch, prefix + place, rows)
    source = x_ptr + image * stride_b + token[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    x = tl.load(source, mask=inside & ~is_masked[:, None], other=0).to(tl.float32)
    mask_token = tl.load(mask_token_ptr + columns, mask=columns < width, other=0).to(tl.float32)
    pos = tl.load(pos_ptr + rows[:, None] * stride_pos + columns[None, :], mask=inside, other=0).to(tl.float32)
    values = tl.where(is_masked[:, None], mask_token[None, :], x) + pos
    target = out_ptr + (image * total + rows)[:, None] * width + columns[None, :]
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def restore_backward_kernel(
    grad_ptr, ids_ptr, x_grad_ptr, mask_sum_ptr, pos_sum_ptr, batch, length, keep, prefix, width,
    stride_b, stride_n, stride_d,
    CHUNK: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr, WITH_POS: tl.constexpr,
):  # fmt: skip
    """Program = (row of the result, chunk of CHUNK images, block of columns)."""
    total = prefix + length
    row = tl.program_id(0) % total
    chunk = tl.program_id(0) // total
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    is_patch = row >= prefix
    mask_sum = tl.zeros([IMAGES, BLOCK], tl.float32)
    pos_sum = tl.zeros([IMAGES, BLOCK], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(batch, (chunk + 1) * CHUNK), IMAGES):
        images = (start + tl.arange(0, IMAGES)).to(tl.int64)
        exists = images < tl.minimum(batch, (chunk + 1) * CHUNK)
        source = grad_ptr + images[:, None] * stride_b + row.to(tl.int64) * stride_n
        grad = tl.load(
            source + columns.to(tl.int64)[None, :] * stride_d, mask=exists[:, None] & inside[None, :], other=0
        )
        place = tl.load(ids_ptr + images * length + row - prefix, mask=exists & is_patch, other=0)
        is_masked = is_patch & (place >= keep)
        token = tl.where(is_patch, prefix + place, row)
        if x_grad_ptr is not None:
            target = x_grad_ptr + (images * (prefix + keep) + token)[:, None] * width + columns[None, :]
            is_kept = (exists & ~is_masked)[:, None] & inside[None, :]
            tl.store(target, grad.to(x_grad_ptr.dtype.element_ty), mask=is_kept)
        wide = grad.to(tl.float32)
        mask_sum += tl.where(is_masked[:, None], wide, 0.0)
        if WITH_POS:
            pos_sum += wide
    partial = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(mask_sum_ptr + partial, tl.sum(mask_sum, 0), mask=inside)
    if WITH_POS:
        tl.store(pos_sum_ptr + partial, tl.sum(pos_sum, 0), mask=inside)


def chunk_size(batch: int) -> int:
    """Images per program of the backward pass: many where they still give all multiprocessors work, because the partial
    sums of a chunk, in float32, have the size of an image: 1 / 32 of a bfloat16 gradient for 64."""
    return 64 if batch > 512 else 16


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    batch, tokens, width = x.shape
    length = ids_restore.shape[1]
    out = allocate(x, mask_token, pos, ids_restore, num_prefix)
    if out.numel():
        rows = tuned("restore")["ROWS"]
        config = row_config(width, out.element_size() * rows)
        pos = pos if pos.stride(1) == 1 else pos.contiguous()
        grid = (batch * cdiv(num_prefix + length, rows), cdiv(width, config["BLOCK"]))
        restore_kernel[grid](
            x, mask_token.contiguous(), pos, ids_restore.contiguous(), out,
            length, tokens - num_prefix, num_prefix, width, *x.stride(), pos.stride(0), ROWS=rows, **config,
        )  # fmt: skip
    return out


def restore_tokens_backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x_grad, mask_grad, pos_grad = allocate_backward(grad, ids_restore, tokens, num_prefix, dtype, wanted)
    batch, total, width = grad.shape
    chunk = chunk_size(batch)
    chunks = cdiv(batch, chunk)
    mask_sum = grad.new_empty((chunks, total, width), dtype=torch.float32)
    pos_sum = grad.new_empty((chunks if wanted[2] else 0, total, width), dtype=torch.float32)
    if grad.numel():
        images = tuned("restore")["IMAGES"]
        config = row_config(width, grad.element_size() * images)
        restore_backward_kernel[(chunks * total, cdiv(width, config["BLOCK"]))](
            grad, ids_restore.contiguous(), x_grad if wanted[0] else None, mask_sum, pos_sum,
            batch, total - num_prefix, tokens - num_prefix, num_prefix, width, *grad.stride(),
            CHUNK=chunk, IMAGES=images, WITH_POS=wanted[2], **config,
        )  # fmt: skip
    if wanted[1]:
        torch.sum(mask_sum, (0, 1), out=mask_grad)
    if wanted[2]:
        torch.sum(pos_sum, 0, out=pos_grad)
    return x_grad, mask_grad, pos_grad
