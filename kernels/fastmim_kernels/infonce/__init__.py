"""InfoNCE between online and target vectors."""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_integer, check_number, check_positive, check_rank, fail, is_float
from ..registration import define, refuse_second_derivative

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
    if q.device != k.device or not (is_float(q) and is_float(k)):
        raise fail(
            "q, k", "floats on one device", f"{q.dtype} on {q.device}, {k.dtype} on {k.device}", "move or convert them"
        )
    check_integer("offset", offset)
    if not 0 <= offset <= k.shape[0] - q.shape[0]:
        raise fail(
            "offset", f"0..{k.shape[0] - q.shape[0]} (N - B)", offset, "pass rank * B, with k gathered from all ranks"
        )
    check_positive("temperature", temperature)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise fail("label_smoothing", "a number in [0, 1)", label_smoothing, "correct label_smoothing")
    if dispatch.uses_reference("infonce", q.device, q, k):
        return dispatch.reference("infonce").contrastive_loss(
            q, k, offset=offset, temperature=temperature, label_smoothing=label_smoothing
        )
    is_gradient_wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return CONTRASTIVE_LOSS(q, k, offset, temperature, label_smoothing, is_gradient_wanted)[0]


def allocate(
    q: Tensor, k: Tensor, offset: int, temperature: float, label_smoothing: float, is_gradient_wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients for a weight of 1: all of float32, since they are small beside the logits."""
    shapes = ((), q.shape, k.shape) if is_gradient_wanted else ((), (0,), (0,))
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output) -> None:
    q, k, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = q.dtype, k.dtype


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():
        refuse_second_derivative("contrastive_loss")
    wanted = ctx.needs_input_grad[:2]
    grads = ((grad * g).to(d) if w else None for g, d, w in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True))
    return *grads, None, None, None, None


CONTRASTIVE_LOSS = define(
    "infonce",
    "contrastive_loss(Tensor q, Tensor k, SymInt offset, float temperature, float label_smoothing,"
    " bool is_gradient_wanted) -> (Tensor, Tensor, Tensor)",
    allocate,
    save=_save,
    backward=_backward,
)
