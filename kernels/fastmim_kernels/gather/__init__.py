"""Select the tokens of chosen patches."""

from torch import Tensor

from .. import dispatch
from ..checks import check_ids, check_rank
from ..registration import define

__all__ = ["gather_tokens"]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Return the tokens ``ids`` of each image: ``x.gather(1, ids[:, :, None].expand(-1, -1, D))``.

    Args:
        x: (B, L, D), any dtype and strides.
        ids: (B, K) int64 in 0..L-1, each id at most once per image (as masks give them; on a GPU the gradient
            relies on it, on a CPU those of an id that repeats add up).

    Returns: (B, K, D) of the dtype of x. Differentiable with respect to x.
    Raises: ValueError or TypeError for shapes, dtype or device that do not fit; IndexError for ids out of range (on the
        CPU).
    Source: facebookresearch/mae models_mae.py ``random_masking``.
    """
    check_rank("x", x, "(B, L, D)")
    check_ids("ids", ids, x.shape[0], x.shape[1], x.device)
    if dispatch.uses_reference("gather", x.device, x):
        return dispatch.reference("gather").gather_tokens(x, ids)
    return GATHER(x, ids)


def allocate(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty((*ids.shape, x.shape[2]))


def allocate_backward(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    return grad.new_empty((grad.shape[0], length, grad.shape[2]))


def _save(ctx, inputs, output) -> None:
    x, ids = inputs
    ctx.save_for_backward(ids)
    ctx.length = x.shape[1]


# A linear op: the gradient of its gradient is the op itself.
SCATTER = define(
    "gather",
    "gather_tokens_backward(Tensor grad, Tensor ids, SymInt length) -> Tensor",
    allocate_backward,
    save=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    backward=lambda ctx, grad: (GATHER(grad, *ctx.saved_tensors), None, None),
)
GATHER = define(
    "gather",
    "gather_tokens(Tensor x, Tensor ids) -> Tensor",
    allocate,
    save=_save,
    backward=lambda ctx, grad: (SCATTER(grad, *ctx.saved_tensors, ctx.length), None),
)
