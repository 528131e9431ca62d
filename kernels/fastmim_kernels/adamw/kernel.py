"""AdamW and what follows it in Triton: one launch for all tensors of a kind, through a table of their addresses."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..ema.kernel import DTYPES, address_table
from ..launch import cdiv
from ..tuning import tuned


@triton.jit
def pointer_at(table_ptr, row, count, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(table_ptr + row * count + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def update(
    param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, inside, numbers_ptr,
    HAS_TARGET: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    """numbers: see ``step_numbers``."""
    decay, grad_scale = tl.load(numbers_ptr).to(tl.float32), tl.load(numbers_ptr + 1).to(tl.float32)
    beta1, beta2 = tl.load(numbers_ptr + 2).to(tl.float32), tl.load(numbers_ptr + 3).to(tl.float32)
    step_size, correction = tl.load(numbers_ptr + 4).to(tl.float32), tl.load(numbers_ptr + 5).to(tl.float32)
    eps, share = tl.load(numbers_ptr + 6).to(tl.float32), tl.load(numbers_ptr + 7).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask=inside).to(tl.float32) * grad_scale
    first = tl.load(first_ptr + index, mask=inside)
    first += (1 - beta1) * (grad - first)
    second = beta2 * tl.load(second_ptr + index, mask=inside) + (1 - beta2) * grad * grad
    param = tl.load(param_ptr + index, mask=inside) * decay
    param -= step_size * tl.div_rn(first, tl.sqrt_rn(second) * correction + eps)
    tl.store(first_ptr + index, first, mask=inside)
    tl.store(second_ptr + index, second, mask=inside)
    tl.store(param_ptr + index, param, mask=inside)
    if HAS_TARGET:
        # Both forms of torch.lerp: each is exact at its end.
        target = tl.load(target_ptr + index, mask=inside)
        away = param - target
        tl.store(
            target_ptr + index, tl.where(share < 0.5, target + share * away, param - (1 - share) * away), mask=inside
        )
    if HAS_COPY:
        tl.store(copy_ptr + index, param.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adamw_kernel(
    table_ptr, numbers_ptr, count, GRAD: tl.constexpr, COPY: tl.constexpr, HAS_TARGET: tl.constexpr,
    HAS_COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (BLOCK values, tensor); the table holds the addresses of six tensors each, and sizes."""
    tensor = tl.program_id(1)
    size = tl.load(table_ptr + 6 * count + tensor)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start < size:
        param_ptr = pointer_at(table_ptr, 0, count, tensor, tl.float32, ALIGNED)
        grad_ptr = pointer_at(table_ptr, 1, count, tensor, GRAD, ALIGNED)
        first_ptr = pointer_at(table_ptr, 2, count, tensor, tl.float32, ALIGNED)
        second_ptr = pointer_at(table_ptr, 3, count, tensor, tl.float32, ALIGNED)
        target_ptr = pointer_at(table_ptr, 4, count, tensor, tl.float32, ALIGNED)
        copy_ptr = pointer_at(table_ptr, 5, count, tensor, COPY, ALIGNED)
        index = start + tl.arange(0, BLOCK)
        # A mask of unknown size would forbid 16-byte accesses.
        if start + BLOCK <= size:
            update(
                param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, None, numbers_ptr,
                HAS_TARGET, HAS_COPY,
            )  # fmt: skip
        else:
            update(
                param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, index < size, numbers_ptr,
                HAS_TARGET, HAS_COPY,
            )  # fmt: skip


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    copies: Sequence[Tensor],
    numbers: Tensor,
) -> None:
    """Tensors whose values do not lie alike in memory, without gaps, are updated as contiguous copies."""
    kept = [params, exp_avgs, exp_avg_sqs, targets, copies]
    dense = [[t.contiguous() for t in tensors] for tensors in kept]
    grads = [g.contiguous() for g in grads]
    sizes = tuple(p.numel() for p in params)
    if not max(sizes, default=0):
        return
    block = tuned("adamw")["BLOCK"]
    addresses: list[int] = []
    for tensors in (dense[0], grads, *dense[1:]):
        addresses += [t.data_ptr() for t in tensors] or [0] * len(params)
    is_aligned = all(address % 16 == 0 for address in addresses)
    # A launch dimension of its own for the tensors is limited to 65,535 of them.
    adamw_kernel[(cdiv(max(sizes), block), len(params))](
        address_table((*addresses, *sizes), numbers.device), numbers, len(params), GRAD=DTYPES[grads[0].dtype],
        COPY=DTYPES[copies[0].dtype] if copies else DTYPES[params[0].dtype], HAS_TARGET=bool(targets),
        HAS_COPY=bool(copies), ALIGNED=is_aligned, BLOCK=block, num_warps=4,
    )  # fmt: skip
    for tensors, written in zip(kept, dense, strict=True):
        for tensor, copy in zip(tensors, written, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
