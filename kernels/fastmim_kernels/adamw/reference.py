"""AdamW by torch's multi-tensor ops, one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    momentum: float | Tensor | None,
) -> None:
    """One group of tensors; targets and copies may be empty."""
    work = params[0].dtype
    grads = torch._foreach_mul([g.to(work) for g in grads], _number(grad_scale, work))
    torch._foreach_mul_(params, _number(1 - lr * weight_decay, work))
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, _number((1 - betas[1] ** step) ** -0.5, work))
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, _number(lr / (1 - betas[0] ** step), work))
    torch._foreach_sub_(params, updates)
    if targets:
        share = _number(1 - momentum, work)
        torch._foreach_lerp_(targets, params, [share] * len(targets) if isinstance(share, Tensor) else share)
    for copy, param in zip(copies, params, strict=bool(copies)):
        copy.copy_(param)


def _number(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else float(value)


@torch.no_grad()
def adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, grad_scale=1.0,
    targets=None, momentum=None, copies=None,
) -> None:  # fmt: skip
    """See the public function: one tensor after the other."""
    none = [None] * len(params)
    for p, g, m, v, target, copy in zip(params, grads, exp_avgs, exp_avg_sqs, targets or none, copies or none):
        target, copy = ([] if t is None else [t] for t in (target, copy))
        update([p], [g], [m], [v], target, copy, step, lr, betas, eps, weight_decay, grad_scale, momentum)
