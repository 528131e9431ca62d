"""Residual addition and LayerNorm in C++: forward and backward read each input once; no float32 copy of the stream."""

import torch
from torch import Tensor

from .. import native_library
from . import allocate, allocate_backward

_add_layer_norm = native_library.function("add_layer_norm")
_add_layer_norm_backward = native_library.function("add_layer_norm_backward")


def _floats(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.float().contiguous() for p in parameters]


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    row_scale: Tensor | None, eps: float, is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, stats = allocate(x, residual, weight, bias, scale, row_scale, eps, is_kept)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias, scale, row_scale = _floats(weight, bias, scale, row_scale)
    width, kinds = x.shape[-1], native_library.DTYPES
    rows = x.numel() // width
    _add_layer_norm(
        x, kinds[x.dtype], residual, kinds[h.dtype], weight, bias, scale, row_scale, rows // max(1, len(x)), eps, rows,
        width, y, h if is_kept else None, stats, torch.get_num_threads(),
    )  # fmt: skip
    return y, h, stats


def add_layer_norm_backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, stats: Tensor, x: Tensor | None, weight: Tensor,
    scale: Tensor | None, row_scale: Tensor | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outs = allocate_backward(grad, grad_h, h, stats, x, weight, scale, row_scale, wanted)
    for_x, for_residual = (out if w else None for out, w in zip(outs[:2], wanted, strict=True))
    grad, grad_h, h, x = (None if t is None else t.contiguous() for t in (grad, grad_h, h, x))
    weight, scale, row_scale = _floats(weight, scale, row_scale)
    width, kinds = h.shape[-1], native_library.DTYPES
    rows = h.numel() // width
    _add_layer_norm_backward(
        grad, grad_h, h, stats, x, kinds[grad.dtype], kinds[h.dtype], weight, scale, row_scale,
        rows // max(1, len(h)), rows, width, for_x, for_residual, outs[2], torch.get_num_threads(),
    )  # fmt: skip
    return outs
