"""Patch contrast in Triton: similarities live in registers, tile by tile, and are made anew for the gradient.

With s_ia the similarity divided by the temperature, lse_i and n_i the log-sum-exp and the number of partners of patch i,
v_i whether it has any, the gradient of the loss with respect to s_ia, taken as one number for the pair, is
M_ia = v_i (exp(s_ia - lse_i) - [partners] / n_i) + v_a (exp(s_ia - lse_a) - [partners] / n_a), divided by G * L.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..infonce.kernel import dot_of_wide, settings, tile_of_logits
from ..launch import cdiv, next_power_of_2, row_config
from . import allocate, allocate_backward


@triton.jit
def norm_kernel(features_ptr, inverse_ptr, length, width, stride_g, stride_l, stride_d, BLOCK: tl.constexpr):
    """Program = patch: 1 / norm of its features."""
    row = tl.program_id(0)
    source = features_ptr + (row // length).to(tl.int64) * stride_g + (row % length).to(tl.int64) * stride_l
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(source + d.to(tl.int64) * stride_d, mask=d < width, other=0).to(tl.float32)
        total += x * x
    tl.store(inverse_ptr + row, 1 / tl.maximum(tl.sqrt_rn(tl.sum(total, 0)), 1e-12))


@triton.jit
def loss_kernel(
    features_ptr, inverse_ptr, src_ptr, lse_ptr, share_ptr, loss_ptr, length, width, stride_g, stride_l, stride_d, scale,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Program = (mixture, TILE patches): log-sum-exp, 1 / number of partners (0 without) and loss of each patch."""
    tiles = tl.cdiv(length, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    features_ptr += group * stride_g
    inverse_ptr += group * length
    src_ptr += group * length
    inverse = tl.load(inverse_ptr + rows, mask=rows < length, other=0)
    src = tl.load(src_ptr + rows, mask=rows < length, other=0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    alike = tl.zeros([TILE], tl.float32)
    count = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        others = start + tl.arange(0, TILE)
        dots = tile_of_logits(
            features_ptr, features_ptr, rows, others, length, length, width, stride_l, stride_d, stride_l, stride_d,
            scale, DTYPE, PRECISION, TILE, INNER,
        )  # fmt: skip
        similarity = dots * inverse[:, None] * tl.load(inverse_ptr + others, mask=others < length, other=0)[None, :]
        is_other = (others < length)[None, :] & (rows[:, None] != others[None, :])
        is_partner = is_other & (src[:, None] == tl.load(src_ptr + others, mask=others < length, other=0)[None, :])
        alike += tl.sum(tl.where(is_partner, similarity, 0.0), 1)
        count += tl.sum(is_partner.to(tl.float32), 1)
        similarity = tl.where(is_other, similarity, float("-inf"))
        # Finite, so that a tile that holds only the patch itself gives exp(-inf), not exp(-inf + inf).
        higher = tl.maximum(tl.maximum(top, tl.max(similarity, 1)), -1e30)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(similarity - higher[:, None]), 1)
        top = higher
    lse = top + tl.log(total)
    share = tl.where(count > 0, 1 / tl.maximum(count, 1.0), 0.0)
    row = group * length + rows
    tl.store(lse_ptr + row, lse, mask=rows < length)
    tl.store(share_ptr + row, share, mask=rows < length)
    tl.store(loss_ptr + row, tl.where(count > 0, lse - alike * share, 0.0), mask=rows < length)


@triton.jit
def grad_kernel(
    features_ptr, inverse_ptr, src_ptr, lse_ptr, share_ptr, upstream_ptr, grad_ptr, length, width,
    stride_g, stride_l, stride_d, scale,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """Program = (mixture, TILE patches), OUTER columns. upstream_ptr -> gradient of the mean loss / (G * L)."""
    tiles = tl.cdiv(length, TILE)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    d = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    features_ptr += group * stride_g
    inverse_ptr += group * length
    src_ptr += group * length
    lse_ptr += group * length
    share_ptr += group * length
    inverse = tl.load(inverse_ptr + rows, mask=rows < length, other=0)
    src = tl.load(src_ptr + rows, mask=rows < length, other=0)
    lse = tl.load(lse_ptr + rows, mask=rows < length, other=0)
    share = tl.load(share_ptr + rows, mask=rows < length, other=0)
    grad = tl.zeros([TILE, OUTER], tl.float32)
    along = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        others = start + tl.arange(0, TILE)
        exists = others < length
        dots = tile_of_logits(
            features_ptr, features_ptr, rows, others, length, length, width, stride_l, stride_d, stride_l, stride_d,
            scale, DTYPE, PRECISION, TILE, INNER,
        )  # fmt: skip
        other_inverse = tl.load(inverse_ptr + others, mask=exists, other=0)
        similarity = dots * inverse[:, None] * other_inverse[None, :]
        other_lse = tl.load(lse_ptr + others, mask=exists, other=0)
        other_share = tl.load(share_ptr + others, mask=exists, other=0)
        is_partner = src[:, None] == tl.load(src_ptr + others, mask=exists, other=0)[None, :]
        own = tl.exp(similarity - lse[:, None]) - tl.where(is_partner, share[:, None], 0.0)
        their = tl.exp(similarity - other_lse[None, :]) - tl.where(is_partner, other_share[None, :], 0.0)
        slope = tl.where((share > 0)[:, None], own, 0.0) + tl.where((other_share > 0)[None, :], their, 0.0)
        slope = tl.where(exists[None, :] & (rows[:, None] != others[None, :]), slope, 0.0)
        along += tl.sum(slope * similarity, 1)
        source = features_ptr + others.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
        features = tl.load(source, mask=exists[:, None] & (d < width)[None, :], other=0)
        grad = dot_of_wide(slope * (other_inverse * scale)[None, :], features, grad, DTYPE, PRECISION)
    # The gradient of a unit vector without its part along the vector.
    mask = (rows < length)[:, None] & (d < width)[None, :]
    source = features_ptr + rows.to(tl.int64)[:, None] * stride_l + d.to(tl.int64)[None, :] * stride_d
    unit = tl.load(source, mask=mask, other=0).to(tl.float32) * inverse[:, None]
    # Below the least norm the vector is divided by a constant.
    along = tl.where(inverse < 1e12, along, 0.0)
    grad = (grad - along[:, None] * unit) * (inverse * tl.load(upstream_ptr))[:, None]
    target = grad_ptr + (group * length + rows)[:, None] * width + d[None, :]
    tl.store(target, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def patch_contrastive_loss(features: Tensor, src: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, length, width = features.shape
    _, inverse, lse, share = allocate(features, src, temperature)
    loss = torch.empty_like(lse)
    norm_kernel[(groups * length,)](
        features, inverse, length, width, *features.stride(), **row_config(width, features.element_size())
    )
    constants = settings(features, features)
    loss_kernel[(groups * cdiv(length, constants["TILE"]),)](
        features, inverse, src.contiguous(), lse, share, loss, length, width, *features.stride(), 1 / temperature,
        **constants, num_warps=constants["TILE"] // 8, num_stages=2,
    )  # fmt: skip
    return loss.mean(), inverse, lse, share


def patch_contrastive_loss_backward(
    grad: Tensor, features: Tensor, src: Tensor, inverse: Tensor, lse: Tensor, share: Tensor, temperature: float
) -> Tensor:
    groups, length, width = features.shape
    out = allocate_backward(grad, features)
    constants = settings(features, features)
    tile = constants["TILE"]
    outer = max(16, min(2 * tile, next_power_of_2(width)))
    grad_kernel[(groups * cdiv(length, tile), cdiv(width, outer))](
        features, inverse, src.contiguous(), lse, share, grad.float() / (groups * length), out,
        length, width, *features.stride(), 1 / temperature,
        OUTER=outer, **constants, num_warps=tile // 8, num_stages=2,
    )  # fmt: skip
    return out
