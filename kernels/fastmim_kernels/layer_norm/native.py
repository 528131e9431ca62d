"""Residual addition and LayerNorm in C++: forward and backward read each input once; no float32 copy of the stream."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define, no_second_derivative
from . import reference

_add_layer_norm = native_library.function("add_layer_norm")
_add_layer_norm_backward = native_library.function("add_layer_norm_backward")


def _floats(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.float().contiguous() for p in parameters]


def _fake(x, residual, weight, bias, scale, row_scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    # x itself is the stream where nothing is done to it.
    is_plain = residual is None and scale is None and row_scale is None
    h = x.new_empty((0,) if is_plain else x.shape, dtype=x.dtype if residual is None else residual.dtype)
    return x.new_empty(x.shape), h, x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor | None,
    row_scale: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, stats = _fake(x, residual, weight, bias, scale, row_scale, eps)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias, scale, row_scale = _floats(weight, bias, scale, row_scale)
    width, kinds = x.shape[-1], native_library.DTYPES
    rows = x.numel() // width
    _add_layer_norm(
        x, kinds[x.dtype], residual, kinds[h.dtype], weight, bias, scale, row_scale, rows // max(1, len(x)), eps, rows,
        width, y, h if h.numel() else None, stats, torch.get_num_threads(),
    )  # fmt: skip
    return y, h, stats


def _fake_backward(grad_y, grad_h, h, stats, x, weight, scale, row_scale, wanted) -> tuple[Tensor, Tensor, Tensor]:
    for_x, for_residual = (t.new_empty(h.shape if w else (0,)) for t, w in zip((grad_y, h), wanted, strict=True))
    return for_x, for_residual, h.new_empty((3, h.shape[-1]), dtype=torch.float32)


def _backward(
    grad_y: Tensor, grad_h: Tensor | None, h: Tensor, stats: Tensor, x: Tensor | None, weight: Tensor,
    scale: Tensor | None, row_scale: Tensor | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outs = _fake_backward(grad_y, grad_h, h, stats, x, weight, scale, row_scale, wanted)
    for_x, for_residual = (out if w else None for out, w in zip(outs[:2], wanted, strict=True))
    grad_y, grad_h, h, x = (None if t is None else t.contiguous() for t in (grad_y, grad_h, h, x))
    weight, scale, row_scale = _floats(weight, scale, row_scale)
    width, kinds = h.shape[-1], native_library.DTYPES
    rows = h.numel() // width
    _add_layer_norm_backward(
        grad_y, grad_h, h, stats, x, kinds[grad_y.dtype], kinds[h.dtype], weight, scale, row_scale,
        rows // max(1, len(h)), rows, width, for_x, for_residual, outs[2], torch.get_num_threads(),
    )  # fmt: skip
    return outs


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, scale, row_scale, _ = inputs
    _, h, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.is_plain = residual is None and scale is None and row_scale is None
    ctx.save_for_backward(
        x if ctx.is_plain else h, stats, None if scale is None else x, weight, scale, row_scale,
    )  # fmt: skip
    ctx.dtypes = [x.dtype, h.dtype]
    ctx.parameters = [None if p is None else p.dtype for p in (weight, bias, scale)]


def _differentiate(ctx, grad_y, grad_h, _):
    h, stats, x, weight, scale, row_scale = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(h, dtype=ctx.dtypes[0])
    if ctx.is_plain:
        grad_h = None
    wanted = list(ctx.needs_input_grad[:2])
    # An unscaled branch of the stream's dtype has the stream's gradient: written once, given to both.
    is_shared = all(wanted) and scale is None and row_scale is None and ctx.dtypes[0] == ctx.dtypes[1]
    wanted[0] &= not is_shared
    for_x, for_residual, sums = _gradient(grad_y, grad_h, h, stats, x, weight, scale, row_scale, wanted)
    parameters = [
        s.to(d) if d is not None and ctx.needs_input_grad[i] else None
        for s, d, i in zip(sums.unbind(), ctx.parameters, (2, 3, 4), strict=True)
    ]
    for_residual = for_residual if wanted[1] else None
    return for_residual if is_shared else for_x if wanted[0] else None, for_residual, *parameters, None, None


_gradient = define(
    "native_add_layer_norm_backward(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor stats, Tensor? x, Tensor weight,"
    " Tensor? scale, Tensor? row_scale, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    backward=no_second_derivative("add_layer_norm"),
)
_op = define(
    "native_add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? scale, Tensor? row_scale,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    backward=_differentiate,
    save=_save,
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the public function. float64 is left to the reference."""
    tensors = [t for t in (x, residual, weight, bias, scale, row_scale) if t is not None]
    if any(t.dtype not in native_library.FLOATS for t in tensors):
        return reference.add_layer_norm(
            x, residual, weight, bias, scale=scale, row_scale=row_scale, eps=eps, prenorm=prenorm
        )
    y, h, _ = _op(x, residual, weight, bias, scale, row_scale, eps)
    if not prenorm:
        return y
    is_plain = residual is None and scale is None and row_scale is None
    return y, x if is_plain else h
