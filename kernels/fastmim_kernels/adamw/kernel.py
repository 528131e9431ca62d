"""AdamW and what follows it in Triton: one launch for all tensors of a kind, through a table of their addresses."""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..addresses import address_table
from ..ema.kernel import DTYPES
from ..gpu import programs_per_tensor
from ..tuning import tuned


@triton.jit
def pointer_at(table_ptr, row, count, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(table_ptr + row * count + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def update(
    param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, inside, decay, numbers_ptr,
    HAS_TARGET: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    """numbers: see ``step_numbers``."""
    grad_scale = tl.load(numbers_ptr + 1).to(tl.float32)
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
    # Nested: the outer condition is a constant of the compilation.
    if HAS_TARGET:  # noqa: SIM102
        if target_ptr.to(tl.int64) != 0:
            # Both forms of torch.lerp: each is exact at its end.
            target = tl.load(target_ptr + index, mask=inside)
            away = param - target
            near, far = target + share * away, param - (1 - share) * away
            tl.store(target_ptr + index, tl.where(share < 0.5, near, far), mask=inside)
    if HAS_COPY:  # noqa: SIM102
        if copy_ptr.to(tl.int64) != 0:
            tl.store(copy_ptr + index, param.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adamw_kernel(
    table_ptr, numbers_ptr, count, GRAD: tl.constexpr, COPY: tl.constexpr, HAS_TARGET: tl.constexpr,
    HAS_COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program = (every so many BLOCK values, tensor); the table holds the addresses of six tensors each, 0 for one that is not
    there, sizes, and the bits of weight decays in float64."""
    tensor = tl.program_id(1)
    size = tl.load(table_ptr + 6 * count + tensor)
    param_ptr = pointer_at(table_ptr, 0, count, tensor, tl.float32, ALIGNED)
    grad_ptr = pointer_at(table_ptr, 1, count, tensor, GRAD, ALIGNED)
    first_ptr = pointer_at(table_ptr, 2, count, tensor, tl.float32, ALIGNED)
    second_ptr = pointer_at(table_ptr, 3, count, tensor, tl.float32, ALIGNED)
    target_ptr = pointer_at(table_ptr, 4, count, tensor, tl.float32, ALIGNED)
    copy_ptr = pointer_at(table_ptr, 5, count, tensor, COPY, ALIGNED)
    weight_decay = tl.load(table_ptr + 7 * count + tensor).to(tl.float64, bitcast=True)
    decay = (1 - tl.load(numbers_ptr) * weight_decay).to(tl.float32)
    size = tl.where(tl.load(numbers_ptr + 8) != 0, size, 0)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        # A mask of unknown size would forbid 16-byte accesses.
        if start + BLOCK <= size:
            update(
                param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, None, decay, numbers_ptr,
                HAS_TARGET, HAS_COPY,
            )  # fmt: skip
        else:
            update(
                param_ptr, grad_ptr, first_ptr, second_ptr, target_ptr, copy_ptr, index, index < size, decay, numbers_ptr,
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
    weight_decays: Sequence[float],
) -> None:
    """Tensors whose values do not lie alike in memory, without gaps, are updated as contiguous copies."""
    kept = [params, exp_avgs, exp_avg_sqs, targets, copies]
    dense = [[t.contiguous() for t in tensors] for tensors in kept]
    grads = [g.contiguous() for g in grads]
    sizes = tuple(p.numel() for p in params)
    if not max(sizes, default=0):
        return
    block = tuned("adamw")["BLOCK"]
    # An empty tensor has the address 0.
    addresses = tuple(t.data_ptr() for tensors in (dense[0], grads, *dense[1:]) for t in tensors)
    decays = struct.unpack(f"{len(params)}q", struct.pack(f"{len(params)}d", *weight_decays))
    # A launch dimension of its own for the tensors is limited to 65,535 of them.
    adamw_kernel[(programs_per_tensor(max(sizes), block, len(params)), len(params))](
        address_table((*addresses, *sizes, *decays), numbers.device), numbers, len(params), GRAD=DTYPES[grads[0].dtype],
        COPY=DTYPES[copies[0].dtype], HAS_TARGET=any(t.numel() for t in targets),
        HAS_COPY=any(t.numel() for t in copies), ALIGNED=all(address % 16 == 0 for address in addresses), BLOCK=block,
        num_warps=8,
    )  # fmt: skip
    for tensors, written in zip(kept, dense, strict=True):
        for tensor, copy in zip(tensors, written, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
