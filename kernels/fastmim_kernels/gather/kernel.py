"""Token gather in Triton. Forward: a row copy. Backward: each row of the gradient of x looks up its owner in ids, so
that every row is written exactly once: no zero fill, no atomics."""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2, row_config
from ..tuning import tuned
from . import allocate, allocate_backward


@triton.jit
def gather_kernel(
    x_ptr, ids_ptr, out_ptr, keep, width, stride_b, stride_l, stride_d, BLOCK: tl.constexpr
):  # fmt: skip
    """out[b, k] = x[b, ids[b, k]]; program = (b * keep + k, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // keep).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = x_ptr + image * stride_b + tl.load(ids_ptr + row) * stride_l
    values = tl.load(source + columns.to(tl.int64) * stride_d, mask=inside, other=0)
    tl.store(out_ptr + row * width + columns, values, mask=inside)


@triton.jit
def scatter_kernel(
    grad_ptr, ids_ptr, out_ptr, keep, length, width, stride_b, stride_k, stride_d,
    ROWS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, l] = grad[b, k] where ids[b, k] = l, else 0; program = (b, ROWS rows l, block of columns)."""
    tiles = tl.cdiv(length, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    owner = tl.full([ROWS], -1, tl.int32)
    for start in range(0, keep, KEEP):
        places = start + tl.arange(0, KEEP)
        ids = tl.load(ids_ptr + image * keep + places, mask=places < keep, other=-1)
        found = tl.where(ids[None, :] == rows[:, None], places[None, :], -1)
        owner = tl.maximum(owner, tl.max(found, 1))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns[None, :] < width
    source = (
        grad_ptr + image * stride_b + owner.to(tl.int64)[:, None] * stride_k + columns.to(tl.int64)[None, :] * stride_d
    )
    values = tl.load(source, mask=(owner >= 0)[:, None] & inside, other=0)
    target = out_ptr + (image * length + rows)[:, None] * width + columns[None, :]
    tl.store(target, values, mask=(rows < length)[:, None] & inside)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    batch, _, width = x.shape
    keep = ids.shape[1]
    out = allocate(x, ids)
    if out.numel():
        config = row_config(width, x.element_size())
        grid = (batch * keep, cdiv(width, config["BLOCK"]))
        gather_kernel[grid](x, ids.contiguous(), out, keep, width, *x.stride(), **config)
    return out


def gather_tokens_backward(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    batch, keep, width = grad.shape
    out = allocate_backward(grad, ids, length)
    if out.numel():
        rows = tuned("gather")["ROWS"]
        config = row_config(width, grad.element_size() * rows)
        grid = (batch * cdiv(length, rows), cdiv(width, config["BLOCK"]))
        block = min(next_power_of_2(keep), 128)
        scatter_kernel[grid](
            grad, ids.contiguous(), out, keep, length, width, *grad.stride(), ROWS=rows, KEEP=block, **config
        )
    return out
