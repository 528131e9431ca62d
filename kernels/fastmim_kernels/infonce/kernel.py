"""InfoNCE in Triton: logits live in registers, tile by tile, and are made anew for the gradient.

A program takes a tile of rows and a range of columns; ranges are added up afterwards in fixed order, so that results
repeat bit for bit. The gradient of k is the gradient of q with the roles exchanged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import allows_tf32
from ..launch import cdiv, next_power_of_2
from . import allocate

# Programs wanted at least: two per multiprocessor of an H200.
PROGRAMS = 264


@triton.jit
def tile_of_logits(
    a_ptr, b_ptr, rows, columns, count_a, count_b, width, stride_a, stride_ad, stride_b, stride_bd, scale,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """scale * a[rows] @ b[columns].T in float32."""
    logits = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, width, INNER):
        d = start + tl.arange(0, INNER)
        a = tl.load(
            a_ptr + rows.to(tl.int64)[:, None] * stride_a + d[None, :] * stride_ad,
            mask=(rows < count_a)[:, None] & (d < width)[None, :],
            other=0,
        )
        b = tl.load(
            b_ptr + columns.to(tl.int64)[None, :] * stride_b + d[:, None] * stride_bd,
            mask=(columns < count_b)[None, :] & (d < width)[:, None],
            other=0,
        )
        logits = tl.dot(a.to(DTYPE), b.to(DTYPE), logits, input_precision=PRECISION)
    return logits * scale


@triton.jit
def dot_of_wide(a, b, total, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, where a is float32 and b has the dtype of the inputs."""
    if DTYPE == tl.float32:  # noqa: SIM300
        return tl.dot(a, b.to(DTYPE), total, input_precision=PRECISION)
    else:
        # a as a sum of two low-precision numbers: 16 or more of its 24 bits.
        high = a.to(DTYPE)
        total = tl.dot(high, b, total)
        return tl.dot((a - high.to(tl.float32)).to(DTYPE), b, total)


@triton.jit
def loss_kernel(
    q_ptr, k_ptr, lse_ptr, sum_ptr, positive_ptr, batch, count, width, offset, share,
    stride_q, stride_qd, stride_k, stride_kd, scale,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Program = (tile of rows, range of ``share`` columns): log-sum-exp and sum of its logits, and the positive's."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, count)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    plain = tl.zeros([TILE], tl.float32)
    positive = tl.zeros([TILE], tl.float32)
    for start in range(first, last, TILE):
        columns = start + tl.arange(0, TILE)
        logits = tile_of_logits(
            q_ptr, k_ptr, rows, columns, batch, count, width, stride_q, stride_qd, stride_k, stride_kd, scale,
            DTYPE, PRECISION, TILE, INNER,
        )  # fmt: skip
        exists = (columns < last)[None, :]
        is_positive = exists & (columns[None, :] == rows[:, None] + offset)
        plain += tl.sum(tl.where(exists, logits, 0.0), 1)
        positive += tl.sum(tl.where(is_positive, logits, 0.0), 1)
        logits = tl.where(exists, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    target = tl.program_id(1) * batch + rows
    tl.store(lse_ptr + target, top + tl.log(total), mask=rows < batch)
    tl.store(sum_ptr + target, plain, mask=rows < batch)
    tl.store(positive_ptr + target, positive, mask=rows < batch)


@triton.jit
def grad_kernel(
    a_ptr, b_ptr, lse_ptr, grad_ptr, count_a, count_b, count_k, width, offset, share,
    stride_a, stride_ad, stride_b, stride_bd, scale, smoothing, weight,
    OF_KEYS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """Gradient of a: program = (tile of a's rows, OUTER of its columns, range of ``share`` rows of b).

    (a, b) = (q, k), or (k, q) where OF_KEYS. weight: 1 / (B * temperature).
    """
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, count_b)
    d = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    grad = tl.zeros([TILE, OUTER], tl.float32)
    if not OF_KEYS:
        lse = tl.load(lse_ptr + rows, mask=rows < count_a, other=0)[:, None]
    for start in range(first, last, TILE):
        others = start + tl.arange(0, TILE)
        logits = tile_of_logits(
            a_ptr, b_ptr, rows, others, count_a, count_b, width, stride_a, stride_ad, stride_b, stride_bd, scale,
            DTYPE, PRECISION, TILE, INNER,
        )  # fmt: skip
        if OF_KEYS:
            lse = tl.load(lse_ptr + others, mask=others < last, other=0)[None, :]
            is_positive = rows[:, None] == others[None, :] + offset
        else:
            is_positive = others[None, :] == rows[:, None] + offset
        wanted = smoothing / count_k + tl.where(is_positive, 1 - smoothing, 0.0)
        slope = tl.where((others < last)[None, :], tl.exp(logits - lse) - wanted, 0.0)
        b = tl.load(
            b_ptr + others.to(tl.int64)[:, None] * stride_b + d[None, :] * stride_bd,
            mask=(others < last)[:, None] & (d < width)[None, :],
            other=0,
        )
        grad = dot_of_wide(slope, b, grad, DTYPE, PRECISION)
    target = grad_ptr + (tl.program_id(2).to(tl.int64) * count_a + rows)[:, None] * width + d[None, :]
    tl.store(target, grad * weight, mask=(rows < count_a)[:, None] & (d < width)[None, :])


def settings(q: Tensor, k: Tensor) -> dict[str, object]:
    """Low-precision inputs have exact products in float32 accumulators. float32 inputs follow torch's own switch; where
    that asks for the highest precision, three products of split numbers come as close as one in float32, and are
    several times faster on tensor cores."""
    precision = "tf32" if allows_tf32() else "tf32x3"
    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    low = dtypes.get(q.dtype) if q.dtype == k.dtype else None
    return {
        "DTYPE": low or tl.float32,
        "PRECISION": "tf32" if low else precision,
        # Split numbers take twice the registers.
        "TILE": 32 if precision == "tf32x3" and not low else 64,
        "INNER": max(16, min(64 if low else 32, next_power_of_2(q.shape[1]))),
    }


def shares(tiles: int, count: int, tile: int) -> tuple[int, int]:
    """(number of ranges, columns per range), so that ``tiles`` tiles of rows make PROGRAMS programs where they can."""
    ranges = max(1, min(cdiv(count, tile), PROGRAMS // max(1, tiles)))
    share = cdiv(cdiv(count, tile), ranges) * tile
    return cdiv(count, share), share


def contrastive_loss(
    q: Tensor, k: Tensor, offset: int, temperature: float, label_smoothing: float, is_gradient_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, width), count = q.shape, k.shape[0]
    _, for_q, for_k = allocate(q, k, offset, temperature, label_smoothing, is_gradient_wanted)
    constants = settings(q, k)
    tile = constants["TILE"]
    tiles = cdiv(batch, tile)
    ranges, share = shares(tiles, count, tile)
    lse, plain, positive = (q.new_empty((ranges, batch), dtype=torch.float32) for _ in range(3))
    loss_kernel[(tiles, ranges)](
        q, k, lse, plain, positive, batch, count, width, offset, share, *q.stride(), *k.stride(), 1 / temperature,
        **constants, num_warps=4, num_stages=2,
    )  # fmt: skip
    lse = lse.logsumexp(0)
    wanted = (1 - label_smoothing) * positive.sum(0) + label_smoothing / count * plain.sum(0)
    loss = (lse - wanted).mean()
    if not is_gradient_wanted:
        return loss, for_q, for_k
    outer = max(16, min(2 * tile, next_power_of_2(width)))
    for of_keys, a, b, out in ((False, q, k, for_q), (True, k, q, for_k)):
        tiles, parts = cdiv(a.shape[0], tile), cdiv(width, outer)
        ranges, share = shares(tiles * parts, b.shape[0], tile)
        grad = out[None] if ranges == 1 else out.new_empty((ranges, *out.shape))
        grad_kernel[(tiles, parts, ranges)](
            a, b, lse, grad, a.shape[0], b.shape[0], count, width, offset, share, *a.stride(), *b.stride(),
            1 / temperature, label_smoothing, 1 / (batch * temperature),
            OF_KEYS=of_keys, OUTER=outer, **constants, num_warps=tile // 8, num_stages=2,
        )  # fmt: skip
        if ranges > 1:
            torch.sum(grad, 0, out=out)
    return loss, for_q, for_k
