"""Residual addition and LayerNorm in Triton: forward and backward read each input once.

Sums over rows (gradients of weight, bias and scale) are made in two stages of fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import multiprocessors
from ..launch import cdiv, next_power_of_2
from ..tuning import tuned
from . import allocate, allocate_backward


@triton.jit
def load(ptr, rows, columns, count, width, stride_n, stride_d):
    """Tile of a (count, width) matrix in float32, 0 outside."""
    source = ptr + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(source, mask=(rows < count)[:, None] & (columns < width)[None, :], other=0).to(tl.float32)


@triton.jit
def store(ptr, value, rows, columns, count, width):
    """Tile of a contiguous (count, width) matrix."""
    target = ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, value.to(ptr.dtype.element_ty), mask=(rows < count)[:, None] & (columns < width)[None, :])


@triton.jit
def load_vector(ptr, columns, width):
    """A parameter as one row."""
    return tl.load(ptr + columns, mask=columns < width, other=0).to(tl.float32)[None, :]


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, row_scale_ptr, out_ptr, h_ptr, stats_ptr,
    count, width, rows_per_image, eps, stride_xn, stride_xd, stride_rn, stride_rd,
    STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    h = load(x_ptr, rows, columns, count, width, stride_xn, stride_xd)
    if scale_ptr is not None:
        h *= load_vector(scale_ptr, columns, width)
    if row_scale_ptr is not None:
        h *= tl.load(row_scale_ptr + rows // rows_per_image, mask=rows < count, other=0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        h += load(residual_ptr, rows, columns, count, width, stride_rn, stride_rd)
    stream = h.to(STREAM)
    if h_ptr is not None:
        store(h_ptr, stream, rows, columns, count, width)
    h = stream.to(tl.float32)
    mean = tl.sum(h, 1) / width
    centered = tl.where((columns < width)[None, :], h - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, 1) / width + eps)
    out = centered * rstd[:, None] * load_vector(weight_ptr, columns, width)
    if bias_ptr is not None:
        out += load_vector(bias_ptr, columns, width)
    store(out_ptr, out, rows, columns, count, width)
    tl.store(stats_ptr + 2 * rows, mean, mask=rows < count)
    tl.store(stats_ptr + 2 * rows + 1, rstd, mask=rows < count)


@triton.jit
def backward_kernel(
    grad_ptr, grad_h_ptr, h_ptr, stats_ptr, x_ptr, weight_ptr, scale_ptr, row_scale_ptr,
    x_grad_ptr, residual_grad_ptr, sums_ptr, count, width, rows_per_image, chunk,
    stride_gn, stride_gd, stride_ghn, stride_ghd, stride_hn, stride_hd, stride_xn, stride_xd,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = ``chunk`` rows, ROWS at a time; sums: gradients of weight, bias and scale."""
    columns = tl.arange(0, BLOCK)
    weight = load_vector(weight_ptr, columns, width)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if scale_ptr is not None:
        scale = load_vector(scale_ptr, columns, width)
    first = tl.program_id(0) * chunk
    for start in range(first, tl.minimum(first + chunk, count), ROWS):
        rows = start + tl.arange(0, ROWS)
        grad = load(grad_ptr, rows, columns, count, width, stride_gn, stride_gd)
        h = load(h_ptr, rows, columns, count, width, stride_hn, stride_hd)
        mean = tl.load(stats_ptr + 2 * rows, mask=rows < count, other=0)[:, None]
        rstd = tl.load(stats_ptr + 2 * rows + 1, mask=rows < count, other=0)[:, None]
        normal = tl.where((columns < width)[None, :], (h - mean) * rstd, 0.0)
        weight_sum += grad * normal
        bias_sum += grad
        grad *= weight
        along = tl.sum(grad * normal, 1)[:, None] / width
        grad = (grad - normal * along - tl.sum(grad, 1)[:, None] / width) * rstd
        if grad_h_ptr is not None:
            grad += load(grad_h_ptr, rows, columns, count, width, stride_ghn, stride_ghd)
        if residual_grad_ptr is not None:
            store(residual_grad_ptr, grad, rows, columns, count, width)
        if row_scale_ptr is not None:
            grad *= tl.load(row_scale_ptr + rows // rows_per_image, mask=rows < count, other=0).to(tl.float32)[:, None]
        if scale_ptr is not None:
            scale_sum += grad * load(x_ptr, rows, columns, count, width, stride_xn, stride_xd)
            grad *= scale
        if x_grad_ptr is not None:
            store(x_grad_ptr, grad, rows, columns, count, width)
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * width + columns
    tl.store(sums_ptr, tl.sum(weight_sum, 0), mask=columns < width)
    tl.store(sums_ptr + width, tl.sum(bias_sum, 0), mask=columns < width)
    tl.store(sums_ptr + 2 * width, tl.sum(scale_sum, 0), mask=columns < width)


def matrix(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor (..., D) as rows, without a copy where its strides allow, and its strides."""
    if tensor is None:
        return None, 0, 0
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows, *rows.stride()


def vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def layout(width: int, full: int) -> dict[str, int]:
    """``full`` values per 4 warps; fewer warps, not more than 8 rows, where rows are narrow."""
    block = next_power_of_2(width)
    # Rows that are not a multiple of 16 bytes are read value by value, which takes more registers.
    values = min(full if width % 8 == 0 else full // 4, 8 * block)
    rows = max(1, values // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, 4 * rows * block // full)}


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def add_layer_norm(x, residual, weight, bias, scale, row_scale, eps: float, is_kept: bool) -> tuple[Tensor, ...]:
    out, h, stats = allocate(x, residual, weight, bias, scale, row_scale, eps, is_kept)
    if out.numel():
        config = layout(x.shape[-1], tuned("layer_norm")["FORWARD_VALUES"])
        rows, *strides = matrix(x)
        stream, *stream_strides = matrix(residual)
        forward_kernel[(cdiv(rows.shape[0], config["ROWS"]),)](
            rows, stream, *vectors(weight, bias, scale, row_scale), out, h if is_kept else None, stats,
            *rows.shape, rows.shape[0] // x.shape[0], eps, *strides, *stream_strides,
            STREAM=DTYPES[h.dtype], **config,
        )  # fmt: skip
    return out, h, stats


def add_layer_norm_backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, stats: Tensor, x: Tensor | None, weight: Tensor,
    scale: Tensor | None, row_scale: Tensor | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_grad, residual_grad, total = allocate_backward(grad, grad_h, h, stats, x, weight, scale, row_scale, wanted)
    width = h.shape[-1]
    count = h.numel() // width
    constants = tuned("layer_norm")
    config = layout(width, constants["BACKWARD_VALUES"])
    # Each program has its own sums; per multiprocessor, as many as its registers hold.
    programs = multiprocessors() * constants["PROGRAMS" if scale is None else "SCALED_PROGRAMS"]
    chunk = max(1, cdiv(cdiv(count, programs), config["ROWS"])) * config["ROWS"]
    sums = h.new_empty((cdiv(count, chunk), 3, width), dtype=torch.float32)
    if count:
        (grad, *a), (grad_h, *b), (rows, *c), (x, *d) = (matrix(t) for t in (grad, grad_h, h, x))
        backward_kernel[(len(sums),)](
            grad, grad_h, rows, stats, x, *vectors(weight, scale, row_scale),
            x_grad if wanted[0] else None, residual_grad if wanted[1] else None, sums,
            count, width, count // h.shape[0], chunk, *a, *b, *c, *d, **config,
        )  # fmt: skip
    torch.sum(sums, 0, out=total)
    return x_grad, residual_grad, total
