"""Input of a decoder: visible tokens back in place, a mask token elsewhere, positions added."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_distinct, check_ids, check_integer, check_rank, fail, is_float
from ..registration import define

__all__ = ["restore_tokens"]


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int = 1) -> Tensor:
    """Put visible tokens back at their patches, fill the masked patches with ``mask_token``, and add ``pos``.

    In plain torch, for one image: ``full = cat([x[P:], mask_token.expand(L - K, D)])[ids_restore]``;
    ``cat([x[:P], full]) + pos``. Added in float32 or wider, rounded once.

    Args:
        x: (B, P + K, D) floats: prefix tokens, then visible tokens in the order of ids_keep.
        mask_token: (D,). pos: (P + L, D), rows of the prefix tokens first.
        ids_restore: (B, L) int64, a permutation of 0..L-1 per image (checked on the CPU only).
        num_prefix: P, 0 or more.

    Returns: (B, P + L, D) in the dtype that x, mask_token and pos promote to. Differentiable with respect to those
        three.
    Raises: ValueError, TypeError or IndexError for arguments that do not fit each other.
    Source: facebookresearch/mae models_mae.py ``forward_decoder``.
    """
    check_rank("x", x, "(B, P + K, D)")
    check_rank("mask_token", mask_token, "(D,)")
    check_rank("pos", pos, "(P + L, D)")
    check_rank("ids_restore", ids_restore, "(B, L)")
    batch, tokens, width = x.shape
    count = ids_restore.shape[1]
    check_ids("ids_restore", ids_restore, batch, count, x.device)
    check_distinct("ids_restore", ids_restore, count)
    check_integer("num_prefix", num_prefix)
    if not 0 <= num_prefix <= tokens:
        raise fail("num_prefix", f"0..{tokens}, the tokens of x", num_prefix, "correct num_prefix")
    if tokens - num_prefix > count:
        raise fail("x", f"at most {num_prefix} + {count} tokens", tokens, "check num_prefix and ids_restore")
    if mask_token.shape[0] != width:
        raise fail("mask_token", f"shape ({width},)", tuple(mask_token.shape), "give it the width of x")
    if tuple(pos.shape) != (num_prefix + count, width):
        raise fail(
            "pos", f"shape ({num_prefix + count}, {width})", tuple(pos.shape), "give one row per prefix token and patch"
        )
    for name, tensor in (("x", x), ("mask_token", mask_token), ("pos", pos)):
        if tensor.device != x.device or not is_float(tensor):
            got = f"{tensor.dtype} on {tensor.device}"
            raise fail(name, f"floats on {x.device} like x", got, "move or convert it", TypeError)
    if dispatch.uses_reference("restore", x.device, x, mask_token, pos):
        return dispatch.reference("restore").restore_tokens(x, mask_token, pos, ids_restore, num_prefix)
    return RESTORE(x, mask_token, pos, ids_restore, num_prefix)


def allocate(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), pos.dtype)
    return x.new_empty((x.shape[0], num_prefix + ids_restore.shape[1], x.shape[2]), dtype=dtype)


def allocate_backward(
    grad: Tensor, ids_restore: Tensor, tokens: int, num_prefix: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, mask_token and pos, empty where they are not wanted."""
    batch, rows, width = grad.shape
    shapes = (batch, tokens, width), (width,), (rows, width)
    dtypes = dtype, torch.float32, torch.float32
    return tuple(grad.new_empty(s if w else (0,), dtype=d) for s, w, d in zip(shapes, wanted, dtypes, strict=True))


def _save(ctx, inputs, output) -> None:
    x, mask_token, pos, ids_restore, ctx.num_prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.tokens, ctx.dtypes = x.shape[1], (x.dtype, mask_token.dtype, pos.dtype)


def _backward(ctx, grad):
    wanted = list(ctx.needs_input_grad[:3])
    grads = RESTORE_BACKWARD(grad, *ctx.saved_tensors, ctx.tokens, ctx.num_prefix, ctx.dtypes[0], wanted)
    return *(g.to(d) if w else None for g, d, w in zip(grads, ctx.dtypes, wanted, strict=True)), None, None


def _save_backward(ctx, inputs, output) -> None:
    grad, ids_restore, _, ctx.num_prefix, _, ctx.wanted = inputs
    ctx.save_for_backward(ids_restore)
    ctx.dtype = grad.dtype


def _backward_twice(ctx, for_x, for_mask, for_pos):
    # The op is linear: what its gradient does to directions is what the op itself does to values.
    if not all(ctx.wanted):
        raise NotImplementedError(
            "restore_tokens: expected gradients for x, mask_token and pos where they are differentiated again, got "
            f"{ctx.wanted}; set FASTMIM_KERNELS=reference."
        )
    return RESTORE(for_x, for_mask, for_pos, *ctx.saved_tensors, ctx.num_prefix).to(ctx.dtype), *[None] * 5


RESTORE_BACKWARD = define(
    "restore",
    "restore_tokens_backward(Tensor grad, Tensor ids_restore, SymInt tokens, SymInt num_prefix, ScalarType dtype,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)",
    allocate_backward,
    save=_save_backward,
    backward=_backward_twice,
)
RESTORE = define(
    "restore",
    "restore_tokens(Tensor x, Tensor mask_token, Tensor pos, Tensor ids_restore, SymInt num_prefix) -> Tensor",
    allocate,
    save=_save,
    backward=_backward,
)
