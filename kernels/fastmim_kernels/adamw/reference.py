"""AdamW by torch's multi-tensor ops, one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    weight_decays: Sequence[float],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float | Tensor,
    momentum: float | Tensor | None,
    applied: Tensor | None,
) -> None:
    """Parameters of one dtype."""
    work = params[0].dtype
    pairs = [(t, p) for t, p in zip(targets, params, strict=True) if t is not None]
    written = [*params, *exp_avgs, *exp_avg_sqs, *(t for t, _ in pairs)]
    before = None if applied is None else [t.clone() for t in written]
    grads = torch._foreach_mul([g.to(work) for g in grads], _number(grad_scale, work))
    for param, decay in zip(params, weight_decays, strict=True):
        param.mul_(_number(1 - lr * decay, work))
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, _number((1 - betas[1] ** step) ** -0.5, work))
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, _number(lr / (1 - betas[0] ** step), work))
    torch._foreach_sub_(params, updates)
    if pairs:
        share = _number(1 - momentum, work)
        shares = [share] * len(pairs) if isinstance(share, Tensor) else share
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), shares)
    if before is not None:
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(torch.where(applied.bool(), tensor, old))
    for copy, param in zip(copies, params, strict=True):
        if copy is not None:
            copy.copy_(param if applied is None else torch.where(applied.bool(), param.to(copy.dtype), copy))


def _number(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else float(value)


@torch.no_grad()
def adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, grad_scale=1.0,
    targets=None, momentum=None, copies=None, applied=None,
) -> None:  # fmt: skip
    """See the public function: one tensor after the other."""
    none = [None] * len(params)
    decays = weight_decay if isinstance(weight_decay, (list, tuple)) else [weight_decay] * len(params)
    for one in zip(params, grads, exp_avgs, exp_avg_sqs, targets or none, copies or none, decays, strict=True):
        update(*([x] for x in one), step, lr, betas, eps, grad_scale, momentum, applied)
