"""Input of a decoder: visible tokens back in place, a mask token elsewhere, positions added."""

from torch import Tensor

from .. import dispatch
from ..checks import check_ids, check_rank, fail

__all__ = ["restore_tokens"]


def restore_tokens(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int = 1) -> Tensor:
    """Put visible tokens back at their patches, fill the masked patches with ``mask_token``, and add ``pos``.

    In plain torch, for one image: ``full = cat([x[P:], mask_token.expand(L - K, D)])[ids_restore]``;
    ``cat([x[:P], full]) + pos``. Added in float32 or wider, rounded once.

    Args:
        x: (B, P + K, D) prefix tokens, then visible tokens in the order of ids_keep.
        mask_token: (D,). pos: (P + L, D), rows of the prefix tokens first.
        ids_restore: (B, L) int64, a permutation of 0..L-1 per image (not checked).
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
    for name, tensor in (("mask_token", mask_token), ("pos", pos)):
        if tensor.device != x.device:
            raise fail(name, f"a tensor on {x.device} like x", tensor.device, "move it")
    return dispatch.implementation("restore", x.device.type).restore_tokens(x, mask_token, pos, ids_restore, num_prefix)
