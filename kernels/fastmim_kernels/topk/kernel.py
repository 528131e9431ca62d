"""Top-K attention in Triton. No score ever leaves the chip.

Forward: a program first holds the whole score rows of its queries and finds each row's K-th best score bit by bit: 32
counts of how many scores are at least a candidate, no sort. Then it makes the scores anew, tile by tile, as the backward
pass does, and compares them with a threshold halfway between the K-th and the next score, so that another order of
summation selects the same keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import allows_tf32
from ..launch import cdiv, next_power_of_2
from . import allocate, allocate_backward

# Scores that a program of the forward pass holds, per warp.
HELD = 2048
# Bytes of a tile of keys in shared memory.
TILE_BYTES = 32768


@triton.jit
def ordered(score):
    """uint32 that orders as the scores do; at least 1 for every number but the NaN of all ones and a sign."""
    # Adding 0 makes +0 of -0, which equals it.
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def load_rows(ptr, rows, columns, count, width, stride_n, stride_d):
    """[rows, columns] of a (count, width) matrix, 0 outside."""
    source = ptr + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(source, mask=(rows < count)[:, None] & (columns < width)[None, :], other=0)


@triton.jit
def load_columns(ptr, rows, columns, count, width, stride_n, stride_d):
    """The same, transposed: [columns, rows]."""
    source = ptr + rows.to(tl.int64)[None, :] * stride_n + columns.to(tl.int64)[:, None] * stride_d
    return tl.load(source, mask=(rows < count)[None, :] & (columns < width)[:, None], other=0)


@triton.jit
def weights(score, lse, threshold, rows, keys, length, prefix):
    """Softmax weights of a tile of scores, and which keys are kept; the other arguments broadcast against the tile."""
    kept = (ordered(score) >= threshold) | (keys < prefix) | (rows < prefix)
    kept = kept & (keys < length) & (rows < length)
    return tl.where(kept, tl.exp(score - lse), 0.0), kept


@triton.jit
def thresholds(
    q_ptr, k_ptr, rows, length, width, prefix, topk, scale, stride_qn, stride_qd, stride_kn, stride_kd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Per row, the highest score and the threshold (as ``ordered``) that keeps the topk best patch keys."""
    keys = tl.arange(0, ALL)
    score = tl.zeros([ROWS, ALL], tl.float32)
    for start in range(0, WIDTH, INNER):
        d = start + tl.arange(0, INNER)
        q = load_rows(q_ptr, rows, d, length, width, stride_qn, stride_qd)
        k = load_columns(k_ptr, keys, d, length, width, stride_kn, stride_kd)
        score = tl.dot(q, k, score, input_precision=PRECISION)
    score *= scale
    top = tl.max(tl.where((keys < length)[None, :], score, float("-inf")), 1)
    order = tl.where(((keys >= prefix) & (keys < length))[None, :], ordered(score), 0)
    # The largest threshold that at least topk patch keys reach, from its highest bit down.
    threshold = tl.zeros([ROWS], tl.uint32)
    for i in range(32):
        candidate = threshold | (tl.full([ROWS], 1, tl.uint32) << (31 - i))
        reached = tl.sum((order >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= topk, candidate, threshold)
    below = tl.max(tl.where(order < threshold[:, None], order, 0), 1)
    return top, threshold - (threshold - below) // 2


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, labels_ptr, out_ptr, lse_ptr, threshold_ptr, count_ptr,
    heads, length, width, prefix, topk, scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, ALL: tl.constexpr, WIDTH: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Program = (image and head, ROWS queries)."""
    tiles = tl.cdiv(length, ROWS)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = matrix // heads, matrix % heads
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    is_query = (rows >= prefix) & (rows < length)
    row = matrix * length + rows
    top, threshold = thresholds(
        q_ptr, k_ptr, rows, length, width, prefix, topk, scale, stride_qn, stride_qd, stride_kn, stride_kd,
        PRECISION, ROWS, ALL, WIDTH, INNER,
    )  # fmt: skip
    tl.store(threshold_ptr + row, threshold.to(tl.int32, bitcast=True), mask=rows < length)

    d = tl.arange(0, WIDTH)
    q = load_rows(q_ptr, rows, d, length, width, stride_qn, stride_qd)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    right = tl.zeros([ROWS], tl.int32)
    if labels_ptr is not None:
        labels_ptr += image * (length - prefix) - prefix
        own = tl.load(labels_ptr + rows, mask=is_query, other=0)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_columns(k_ptr, keys, d, length, width, stride_kn, stride_kd)
        v = load_rows(v_ptr, keys, d, length, width, stride_vn, stride_vd)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        weight, kept = weights(score, top[:, None], threshold[:, None], rows[:, None], keys[None, :], length, prefix)
        total += tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out, input_precision=PRECISION)
        if labels_ptr is not None:
            is_patch = (keys >= prefix) & (keys < length)
            other = tl.load(labels_ptr + keys, mask=is_patch, other=0)
            is_right = kept & is_patch[None, :] & (own[:, None] == other[None, :])
            right += tl.sum(is_right.to(tl.int32), 1)
    target = out_ptr + image * stride_ob + head * stride_oh + rows.to(tl.int64)[:, None] * stride_on + d[None, :]
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(target, out, mask=(rows < length)[:, None] & (d < width)[None, :])
    tl.store(lse_ptr + row, top + tl.log(total), mask=rows < length)
    if labels_ptr is not None:
        target = count_ptr + matrix * (length - prefix) - prefix + rows
        tl.store(target, right.to(tl.int64), mask=is_query)


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, threshold_ptr, delta_ptr, q_grad_ptr,
    heads, length, width, prefix, scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_on,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = (image and head, ROWS queries); also writes delta = sum of grad * out per query."""
    tiles = tl.cdiv(length, ROWS)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = matrix // heads, matrix % heads
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    own = image * stride_ob + head * stride_oh
    q = load_rows(q_ptr + image * stride_qb + head * stride_qh, rows, d, length, width, stride_qn, stride_qd)
    grad = load_rows(grad_ptr + image * stride_gb + head * stride_gh, rows, d, length, width, stride_gn, stride_gd)
    out = load_rows(out_ptr + own, rows, d, length, width, stride_on, 1)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = matrix * length + rows
    tl.store(delta_ptr + row, delta, mask=rows < length)
    lse = tl.load(lse_ptr + row, mask=rows < length, other=0)
    threshold = tl.load(threshold_ptr + row, mask=rows < length, other=0).to(tl.uint32, bitcast=True)
    q_grad = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, length, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_columns(k_ptr, keys, d, length, width, stride_kn, stride_kd)
        v = load_columns(v_ptr, keys, d, length, width, stride_vn, stride_vd)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        weight, _ = weights(score, lse[:, None], threshold[:, None], rows[:, None], keys[None, :], length, prefix)
        slope = weight * (tl.dot(grad, v, input_precision=PRECISION) - delta[:, None])
        q_grad = tl.dot(slope.to(q.dtype), tl.trans(k), q_grad, input_precision=PRECISION)
    target = q_grad_ptr + own + rows.to(tl.int64)[:, None] * stride_on + d[None, :]
    mask = (rows < length)[:, None] & (d < width)[None, :]
    tl.store(target, (q_grad * scale).to(q_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, threshold_ptr, delta_ptr, k_grad_ptr, v_grad_ptr,
    heads, length, width, prefix, scale,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_ob, stride_oh, stride_on,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program = (image and head, KEYS keys). Tiles are [keys, queries]."""
    tiles = tl.cdiv(length, KEYS)
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = matrix // heads, matrix % heads
    keys = tl.program_id(0) % tiles * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, WIDTH)
    q_ptr += image * stride_qb + head * stride_qh
    grad_ptr += image * stride_gb + head * stride_gh
    k = load_rows(k_ptr + image * stride_kb + head * stride_kh, keys, d, length, width, stride_kn, stride_kd)
    v = load_rows(v_ptr + image * stride_vb + head * stride_vh, keys, d, length, width, stride_vn, stride_vd)
    k_grad = tl.zeros([KEYS, WIDTH], tl.float32)
    v_grad = tl.zeros([KEYS, WIDTH], tl.float32)
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        row = matrix * length + rows
        lse = tl.load(lse_ptr + row, mask=rows < length, other=0)
        delta = tl.load(delta_ptr + row, mask=rows < length, other=0)
        threshold = tl.load(threshold_ptr + row, mask=rows < length, other=0).to(tl.uint32, bitcast=True)
        q = load_columns(q_ptr, rows, d, length, width, stride_qn, stride_qd)
        grad = load_columns(grad_ptr, rows, d, length, width, stride_gn, stride_gd)
        score = tl.dot(k, q, input_precision=PRECISION) * scale
        weight, _ = weights(score, lse[None, :], threshold[None, :], rows[None, :], keys[:, None], length, prefix)
        v_grad = tl.dot(weight.to(v.dtype), tl.trans(grad), v_grad, input_precision=PRECISION)
        slope = weight * (tl.dot(v, grad, input_precision=PRECISION) - delta[None, :])
        k_grad = tl.dot(slope.to(k.dtype), tl.trans(q), k_grad, input_precision=PRECISION)
    target = image * stride_ob + head * stride_oh + keys.to(tl.int64)[:, None] * stride_on + d[None, :]
    mask = (keys < length)[:, None] & (d < width)[None, :]
    tl.store(k_grad_ptr + target, (k_grad * scale).to(k_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(v_grad_ptr + target, v_grad.to(v_grad_ptr.dtype.element_ty), mask=mask)


def precision(dtype: torch.dtype) -> str:
    """float32 follows torch's own switch; without TF32 it takes three products of split numbers, exact to float32."""
    return "tf32x3" if dtype == torch.float32 and not allows_tf32() else "tf32"


def bits(threshold: Tensor) -> Tensor:
    """Thresholds are integers that order as scores do; only their 32 bits are kept."""
    return threshold.view(torch.int32)


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk: int, num_prefix: int, scale: float, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse, threshold, count = allocate(q, k, v, topk, num_prefix, scale, labels)
    batch, heads, length, width = q.shape
    if out.numel():
        every = max(16, next_power_of_2(length))
        wide = max(16, next_power_of_2(width))
        # Split numbers take three times the registers.
        most, warps = (32, 8) if q.dtype == torch.float32 else (64, 4)
        rows = max(16, min(most, 8 * HELD // every, next_power_of_2(length)))
        forward_kernel[(batch * heads * cdiv(length, rows),)](
            q, k, v, None if labels is None else labels.contiguous(), out, lse, bits(threshold), count,
            heads, length, width, num_prefix, topk, scale,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
            PRECISION=precision(q.dtype), ROWS=rows, KEYS=32, ALL=every, WIDTH=wide,
            INNER=max(16, min(wide, TILE_BYTES // (every * q.element_size()))),
            num_warps=max(warps, rows * every // HELD), num_stages=1,
        )  # fmt: skip
    return out, lse, threshold, count


def topk_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, threshold: Tensor,
    num_prefix: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = allocate_backward(grad, q, k, v)
    batch, heads, length, width = q.shape
    if out.numel():
        # It was given with the strides of a gradient; whoever kept it meanwhile (saved-tensor hooks) may have changed them.
        if out.stride() != grads[0].stride():
            out = torch.empty_like(grads[0]).copy_(out)
        delta = torch.empty_like(lse)
        # Split numbers take three times the registers.
        own, other = (32, 32) if q.dtype == torch.float32 else (64, 32)
        grid = (batch * heads * cdiv(length, own),)
        options = {
            "PRECISION": precision(q.dtype),
            "WIDTH": max(16, next_power_of_2(width)),
            # Wide heads do not fit the registers of four.
            "num_warps": 8 if width > 64 else 4,
            "num_stages": 1,
        }
        sizes = (heads, length, width, num_prefix, scale)
        strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *grads[0].stride()[:3])
        query_grad_kernel[grid](
            q, k, v, out, grad, lse, bits(threshold), delta, grads[0], *sizes, *strides, ROWS=own, KEYS=other, **options
        )
        key_grad_kernel[grid](
            q, k, v, grad, lse, bits(threshold), delta, *grads[1:], *sizes, *strides, ROWS=other, KEYS=own, **options
        )
    return grads
