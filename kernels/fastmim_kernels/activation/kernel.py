"""GELU in Triton, with the bias in the same pass. Backward: one pass, the bias's gradient in two stages of fixed order.

In 16 bits the error function, of 20 and more instructions, is what takes the time; there a polynomial in an exponential is
exact enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from ..tuning import tuned
from . import allocate, allocate_backward


@triton.jit
def load_sum(x_ptr, bias_ptr, rows, columns, count, width, stride_n, stride_d):
    """x + bias in float32, 0 outside."""
    source = x_ptr + rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    x = tl.load(source, mask=(rows < count)[:, None] & (columns < width)[None, :], other=0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=columns < width, other=0).to(tl.float32)[None, :]
    return x


@triton.jit
def normal_cdf(y, dtype: tl.constexpr):
    """Phi(y) in float32, as exact as a result in ``dtype`` needs.

    For 16 bits from log2 Phi(-u), u = abs(y), which is nearly a parabola: the polynomial of degree 7 with the least maximal
    error on 0 <= u <= 6 (own fit, by reweighted least squares). Phi(-u) is off by 7e-6 of itself at most; beyond 6, where
    u Phi(-u) < 6e-9, by less than 5e-13.
    """
    if dtype == tl.float32:
        return 0.5 * (1 + tl.erf(y * 0.7071067811865476))
    u = tl.abs(y)
    power = -1.8348109733778983e-06 * u + 6.159828626550734e-05
    power = power * u - 0.0009305247804149985
    power = power * u + 0.00850789062678814
    power = power * u - 0.05396007001399994
    power = power * u - 0.4584643840789795
    power = power * u - 1.1512510776519775
    power = power * u - 0.9999952912330627
    tail = tl.exp2(power)
    return tl.where(y > 0, 1 - tail, tail)


@triton.jit
def forward_kernel(x_ptr, bias_ptr, out_ptr, count, width, stride_n, stride_d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program = (ROWS rows, block of columns)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = load_sum(x_ptr, bias_ptr, rows, columns, count, width, stride_n, stride_d)
    out = y * normal_cdf(y, out_ptr.dtype.element_ty)
    target = out_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=(rows < count)[:, None] & (columns < width)[None, :])


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, bias_ptr, x_grad_ptr, bias_sum_ptr, count, width, chunk, stride_gn, stride_gd, stride_n, stride_d,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (``chunk`` rows, block of columns)."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * chunk
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + chunk, count), ROWS):
        rows = start + tl.arange(0, ROWS)
        y = load_sum(x_ptr, bias_ptr, rows, columns, count, width, stride_n, stride_d)
        grad = load_sum(grad_ptr, None, rows, columns, count, width, stride_gn, stride_gd)
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * y * y)
        grad *= normal_cdf(y, x_grad_ptr.dtype.element_ty) + y * density
        target = x_grad_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
        mask = (rows < count)[:, None] & (columns < width)[None, :]
        tl.store(target, grad.to(x_grad_ptr.dtype.element_ty), mask=mask)
        total += grad
    if bias_ptr is not None:
        partial = bias_sum_ptr + tl.program_id(0).to(tl.int64) * width + columns
        tl.store(partial, tl.sum(total, 0), mask=columns < width)


def layout(width: int, itemsize: int) -> dict[str, int]:
    """ROWS rows per program of the forward pass, and that one of the backward pass reads at a time."""
    rows = tuned("activation")["ROWS"]
    block = min(tuned("activation")["COLUMNS"], next_power_of_2(width))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(4, rows * block * itemsize // 1024))}


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    out = allocate(x, bias)
    if out.numel():
        rows = x.reshape(-1, x.shape[-1])
        config = layout(rows.shape[1], x.element_size())
        forward_kernel[(cdiv(rows.shape[0], config["ROWS"]), cdiv(rows.shape[1], config["BLOCK"]))](
            rows, None if bias is None else bias.contiguous(), out, *rows.shape, *rows.stride(), **config
        )
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    x_grad, bias_grad = allocate_backward(grad, x, bias)
    width = x.shape[-1]
    if not x.numel():
        return x_grad, bias_grad.zero_()
    rows, grad = x.reshape(-1, width), grad.reshape(-1, width)
    # About 16 chunks per multiprocessor and block of columns: enough work for all, and few partial sums.
    config = layout(width, x.element_size())
    chunk = cdiv(cdiv(rows.shape[0], 256), config["ROWS"]) * config["ROWS"]
    chunks = cdiv(rows.shape[0], chunk)
    bias_sum = x.new_empty((chunks, width if bias is not None else 0), dtype=torch.float32)
    backward_kernel[(chunks, cdiv(width, config["BLOCK"]))](
        grad, rows, None if bias is None else bias.contiguous(), x_grad, bias_sum, *rows.shape, chunk,
        *grad.stride(), *rows.stride(), **config,
    )  # fmt: skip
    return x_grad, torch.sum(bias_sum, 0, out=bias_grad)
