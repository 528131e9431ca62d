"""Decoder input in C++: one pass over the result; in the gradient, one over the incoming gradient (two with pos)."""

import torch
from torch import Tensor

from .. import native_library
from ..registration import define
from . import reference

_restore = native_library.function("restore_tokens")
_restore_backward = native_library.function("restore_tokens_backward")


def _promoted(x: Tensor, mask_token: Tensor, pos: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)


def _fake(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    shape = x.shape[0], num_prefix + ids_restore.shape[1], x.shape[2]
    return x.new_empty(shape, dtype=_promoted(x, mask_token, pos))


def _forward(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    out = _fake(x, mask_token, pos, ids_restore, num_prefix)
    batch, tokens, width = x.shape
    # Rows are read as they lie; only a strided row has to be copied first.
    x = x if x.stride(2) == 1 else x.contiguous()
    mask_token, pos = mask_token.float().contiguous(), pos.float().contiguous()
    _restore(
        x, x.stride(0), x.stride(1), native_library.DTYPES[x.dtype], mask_token, pos, ids_restore.contiguous(), batch,
        ids_restore.shape[1], tokens - num_prefix, num_prefix, width, out, native_library.DTYPES[out.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake_backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    batch, rows, width = grad.shape
    shapes = (batch, tokens, width), (width,), (rows, width)
    dtypes = dtype, torch.float32, torch.float32
    return tuple(grad.new_empty(s if w else (0,), dtype=d) for s, w, d in zip(shapes, wanted, dtypes, strict=True))


def _backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    outs = _fake_backward(grad, ids_restore, tokens, num_prefix, dtype, wanted)
    for_x, for_mask, for_pos = (out if w else None for out, w in zip(outs, wanted, strict=True))
    grad, ids_restore = grad.contiguous(), ids_restore.contiguous()
    _restore_backward(
        grad, native_library.DTYPES[grad.dtype], ids_restore, len(grad), ids_restore.shape[1], tokens - num_prefix,
        num_prefix, grad.shape[2], for_x, native_library.DTYPES[dtype], for_mask, for_pos, torch.get_num_threads(),
    )  # fmt: skip
    return outs


def _save(ctx, inputs, output) -> None:
    x, mask_token, pos, ids_restore, ctx.num_prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.tokens, ctx.dtypes = x.shape[1], (x.dtype, mask_token.dtype, pos.dtype)


def _differentiate(ctx, grad):
    wanted = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.tokens, ctx.num_prefix, ctx.dtypes[0], wanted)
    return *(g.to(d) if w else None for g, d, w in zip(grads, ctx.dtypes, wanted, strict=True)), None, None


def _save_backward(ctx, inputs, output) -> None:
    grad, ids_restore, _, ctx.num_prefix, _, ctx.wanted = inputs
    ctx.save_for_backward(ids_restore)
    ctx.dtype = grad.dtype


def _differentiate_backward(ctx, for_x, for_mask, for_pos):
    # The op is linear: what its gradient does to directions is what the op itself does to values.
    if not all(ctx.wanted):
        raise NotImplementedError(
            "restore_tokens: expected gradients for x, mask_token and pos where they are differentiated again, got "
            f"{ctx.wanted}; set FASTMIM_KERNELS=reference."
        )
    return _op(for_x, for_mask, for_pos, *ctx.saved_tensors, ctx.num_prefix).to(ctx.dtype), *[None] * 5


_backward_op = define(
    "native_restore_tokens_backward(Tensor grad, Tensor ids_restore, SymInt tokens, int num_prefix, ScalarType dtype,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    backward=_differentiate_backward,
    save=_save_backward,
)
_op = define(
    "native_restore_tokens(Tensor x, Tensor mask_token, Tensor pos, Tensor ids_restore, int num_prefix) -> Tensor",
    _forward,
    _fake,
    backward=_differentiate,
    save=_save,
)


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int = 1) -> Tensor:
    """See the public function. Other dtypes than float32, bfloat16 and float16 are left to the reference."""
    if any(t.dtype not in native_library.FLOATS for t in (x, mask_token, pos)):
        return reference.restore_tokens(x, mask_token, pos, ids_restore, num_prefix)
    return _op(x, mask_token, pos, ids_restore, num_prefix)
