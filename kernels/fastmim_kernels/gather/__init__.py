"""Select the tokens of chosen patches."""

from torch import Tensor

from .. import dispatch
from ..checks import check_ids, check_rank

__all__ = ["gather_tokens"]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Return the tokens ``ids`` of each image: ``x.gather(1, ids[:, :, None].expand(-1, -1, D))``.

    Args:
        x: (B, L, D), any dtype and strides.
        ids: (B, K) int64 in 0..L-1, each id at most once per image (as masks give them; kernels rely on it in the
            gradient).

    Returns: (B, K, D) of the dtype of x. Differentiable with respect to x.
    Raises: ValueError or TypeError for shapes, dtype or device that do not fit; IndexError for ids out of range (on the
        CPU).
    Source: facebookresearch/mae models_mae.py ``random_masking``.
    """
    check_rank("x", x, "(B, L, D)")
    check_ids("ids", ids, x.shape[0], x.shape[1], x.device)
    return dispatch.implementation("gather", x.device.type).gather_tokens(x, ids)
