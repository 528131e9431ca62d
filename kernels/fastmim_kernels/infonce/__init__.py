"""InfoNCE between online and target vectors."""

from torch import Tensor

from .. import dispatch
from ..checks import check_positive, check_rank, fail

__all__ = ["contrastive_loss"]


def contrastive_loss(
    q: Tensor, k: Tensor, *, offset: int = 0, temperature: float, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of ``q @ k.T / temperature`` with row i's positive at column i + offset, mean over the rows.

    Logits are computed in float32 even under autocast: at temperature 0.07 they reach 14.3, where bfloat16 is 0.06
    apart. (``torch.set_float32_matmul_precision`` below "highest" still lowers the precision of the product.)
    q and k are used as given: normalize them first, and detach k for a one-sided loss.

    Args:
        q: (B, D) floats. k: (N, D) floats, N >= B; with several ranks the gathered vectors of all of them.
        offset: column of the positive of row 0 (rank * B), 0..N - B.
        temperature: above 0. label_smoothing: in [0, 1).

    Returns: scalar float32 (float64 for float64 inputs). Differentiable with respect to q and k.
    Raises: ValueError for empty or unfitting shapes, offset, temperature or label_smoothing out of range.
    Source: van den Oord et al., arXiv 1807.03748; ZhichengHuang/CMAE cmae_head.py (which multiplies by 2 * temperature
        besides).
    """
    check_rank("q", q, "(B, D)")
    check_rank("k", k, "(N, D)")
    if q.shape[1] != k.shape[1] or q.numel() == 0:
        raise fail(
            "q, k", "(B, D) and (N, D), not empty", f"{tuple(q.shape)} and {tuple(k.shape)}", "give both the same width"
        )
    if q.device != k.device or not (q.is_floating_point() and k.is_floating_point()):
        raise fail(
            "q, k", "floats on one device", f"{q.dtype} on {q.device}, {k.dtype} on {k.device}", "move or convert them"
        )
    if not 0 <= offset <= k.shape[0] - q.shape[0]:
        raise fail(
            "offset", f"0..{k.shape[0] - q.shape[0]} (N - B)", offset, "pass rank * B, with k gathered from all ranks"
        )
    check_positive("temperature", temperature)
    if not 0 <= label_smoothing < 1:
        raise fail("label_smoothing", "a number in [0, 1)", label_smoothing, "correct label_smoothing")
    return dispatch.implementation("infonce", q.device.type).contrastive_loss(
        q, k, offset=offset, temperature=temperature, label_smoothing=label_smoothing
    )
