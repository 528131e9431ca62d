"""EMA in Triton: one launch for all tensors of the same dtypes, through a table of their addresses."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..addresses import address_table
from ..gpu import programs_per_tensor
from ..tuning import tuned
from . import reference

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def lerp(target_ptr, online_ptr, index, inside, weight):
    """Both forms of torch.lerp: each is exact at its end."""
    target = tl.load(target_ptr + index, mask=inside)
    online = tl.load(online_ptr + index, mask=inside).to(tl.float32)
    near = target + weight * (online - target)
    far = online - (1 - weight) * (online - target)
    tl.store(target_ptr + index, tl.where(weight < 0.5, near, far), mask=inside)


@triton.jit
def ema_kernel(table_ptr, weight_ptr, count, ONLINE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Program = (every so many BLOCK values, tensor); the table holds target addresses, online addresses and sizes."""
    tensor = tl.program_id(1)
    size = tl.load(table_ptr + 2 * count + tensor)
    target_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(tl.float32))
    online_ptr = tl.load(table_ptr + count + tensor).to(tl.pointer_type(ONLINE))
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
        online_ptr = tl.multiple_of(online_ptr, 16)
    weight = tl.load(weight_ptr)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        # A mask of unknown size would forbid 16-byte accesses.
        if start + BLOCK <= size:
            lerp(target_ptr, online_ptr, index, None, weight)
        else:
            lerp(target_ptr, online_ptr, index, index < size, weight)


def is_same_and_dense(a: Tensor, b: Tensor) -> bool:
    """Whether equal places in memory are equal places in the tensors, with no gap between."""
    reach = sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    return a.stride() == b.stride() and reach + 1 == a.numel()


def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], weight: Tensor) -> None:
    """Tensors with gaps or of float64 are left to the reference."""
    groups = defaultdict(list)
    others: list[tuple[Tensor, Tensor]] = []
    for t, o in zip(targets, onlines, strict=True):
        if t.numel() == 0:
            continue
        if t.dtype == torch.float32 and o.dtype in DTYPES and is_same_and_dense(t, o):
            groups[o.dtype].append((t, o))
        else:
            others.append((t, o))
    block = tuned("ema")["BLOCK"]
    for dtype, pairs in groups.items():
        target_at, online_at = (tuple(t.data_ptr() for t in tensors) for tensors in zip(*pairs, strict=True))
        sizes = tuple(t.numel() for t, _ in pairs)
        table = address_table((*target_at, *online_at, *sizes), weight.device)
        is_aligned = all(address % 16 == 0 for address in (*target_at, *online_at))
        ema_kernel[(programs_per_tensor(max(sizes), block, len(pairs)), len(pairs))](
            table, weight, len(pairs), ONLINE=DTYPES[dtype], ALIGNED=is_aligned, BLOCK=block, num_warps=4
        )
    if others:
        reference.ema_update(*zip(*others, strict=True), 1 - weight.double())
