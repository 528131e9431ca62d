"""Top-K attention in C++. bfloat16 by a CPU's own products of it, a whole head at a time as in ``qkv``; else a few heads at a
time, products by torch, selection and softmax in C++ on scores that stay in cache.

Scores are float32 sums of exact products; weights and their gradients are multiplied in the dtype of q, as the reference
does it.
"""

import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import native_library
from ..qkv import LONGEST
from . import allocate, allocate_backward

_softmax = native_library.function("topk_softmax")
_softmax_backward = native_library.function("topk_softmax_backward")
_attention = native_library.function("topk_attention")
_attention_backward = native_library.function("topk_attention_backward")

# Scores at a time: 2 MB, a core's level 2 cache.
BLOCK = 1 << 19


def _blocks(batch: int, heads: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of images and of heads: several whole images, or part of one."""
    at_once, heads = max(1, BLOCK // length**2), max(1, heads)
    images, heads_at_once = max(1, at_once // heads), min(heads, at_once)
    for b in range(0, batch, images):
        for h in range(0, heads, heads_at_once):
            yield slice(b, min(b + images, batch)), slice(h, min(h + heads_at_once, heads))


def _rows(x: Tensor, block: tuple[slice, slice]) -> Tensor:
    """One block of (B, H, N, d) as (heads, N, d), which torch multiplies without a further copy."""
    rows = x[block].flatten(0, 1)
    return rows if x.dtype == torch.float32 and x.stride(3) == 1 else rows.contiguous()


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the scores of one block."""
    batch, heads, length, _ = like.shape
    most = max(((b.stop - b.start) * (h.stop - h.start) for b, h in _blocks(batch, heads, length)), default=0)
    return like.new_empty((most, length, length), dtype=dtype)


@functools.cache
def _has_products() -> bool:
    try:
        _attention(*[None] * 4, native_library.integers(*[0] * 12), 1.0, 0, 1, 1, 1, 0, 1, *[None] * 4, 1)
    except ImportError:
        return False
    return True


def _is_by_head(q: Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.shape[2] <= LONGEST and _has_products()


def _with_strides(*tensors: Tensor) -> tuple[tuple[Tensor, ...], ctypes.Array]:
    """(B, H, N, d) tensors whose rows are contiguous, and the strides of images, heads and rows."""
    tables = tuple(t if t.stride(3) == 1 else t.contiguous() for t in tensors)
    return tables, native_library.integers(*(stride for table in tables for stride in table.stride()[:3]))


def topk_attention(
    q: Tensor, k: Tensor, v: Tensor, topk: int, num_prefix: int, scale: float, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = out, tops, least, counts = allocate(q, k, v, topk, num_prefix, scale, labels)
    kind, threads = native_library.DTYPES[q.dtype], torch.get_num_threads()
    if _is_by_head(q):
        tables, strides = _with_strides(q, k, v, out)
        batch, heads, length, width = q.shape
        labels = None if labels is None else labels.contiguous()
        _attention(
            *tables, strides, scale, batch, length, heads, width, num_prefix, topk, tops, least, labels,
            None if labels is None else counts, threads,
        )  # fmt: skip
        return outs
    all_scores, all_weights = _scratch(q, torch.float32), _scratch(q, q.dtype)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(*q.shape[:3]):
            queries, keys = _rows(q, block).float(), _rows(k, block).float()
            scores, weights = all_scores[: len(queries)], all_weights[: len(queries)]
            torch.bmm(queries, keys.transpose(1, 2), out=scores)
            _softmax(
                scores, len(scores), q.shape[2], num_prefix, topk, scale, weights, kind, tops[block].flatten(0, 1),
                least[block].flatten(0, 1), None if labels is None else labels[block[0]].contiguous(),
                block[1].stop - block[1].start, None if labels is None else counts[block].flatten(0, 1), threads,
            )  # fmt: skip
            torch.bmm(weights, _rows(v, block), out=out[block].flatten(0, 1))
    return outs


def topk_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, tops: Tensor, least: Tensor, num_prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outs = allocate_backward(grad, q, k, v)
    kind, threads = native_library.DTYPES[q.dtype], torch.get_num_threads()
    if _is_by_head(q):
        tables, strides = _with_strides(grad, q, k, v, *outs)
        batch, heads, length, width = q.shape
        _attention_backward(*tables, strides, scale, batch, length, heads, width, num_prefix, tops, least, threads)
        return outs
    all_scores, all_weights, all_slopes = (_scratch(q, d) for d in (torch.float32, q.dtype, q.dtype))
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(*q.shape[:3]):
            g, queries, keys, values = (_rows(t, block) for t in (grad, q, k, v))
            scores, weights, slopes = (t[: len(g)] for t in (all_scores, all_weights, all_slopes))
            torch.bmm(queries.float(), keys.float().transpose(1, 2), out=scores)
            torch.bmm(g, values.transpose(1, 2), out=slopes)
            _softmax_backward(
                scores, len(scores), q.shape[2], num_prefix, scale, tops[block].flatten(0, 1),
                least[block].flatten(0, 1), slopes, kind, weights, slopes, threads,
            )  # fmt: skip
            for_q, for_k, for_v = (t[block].flatten(0, 1) for t in outs)
            torch.bmm(slopes, keys, out=for_q)
            torch.bmm(slopes.transpose(1, 2), queries, out=for_k)
            torch.bmm(weights.transpose(1, 2), g, out=for_v)
    return outs
