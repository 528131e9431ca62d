"""A step of AdamW and what follows it, in one pass: clipping, moving average, low-precision copy."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..checks import (
    check_number,
    check_scalar,
    check_tensor,
    check_tensors,
    check_written,
    describe,
    fail,
    is_float,
    shown,
)
from ..registration import define

__all__ = ["adamw_ema"]

Number = float | Tensor
Some = Sequence[Tensor | None] | None


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: Number,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.05,
    grad_scale: Number = 1.0,
    targets: Some = None,
    momentum: Number | None = None,
    copies: Some = None,
    applied: Tensor | None = None,
) -> None:
    """Update parameters, both moments, moving averages and low-precision copies, in place and with no gradient.

    In plain torch, for each tensor, with t the number of this step: ``g = grad * grad_scale``; ``p *= 1 - lr *
    weight_decay``; ``m = b1 * m + (1 - b1) * g``; ``v = b2 * v + (1 - b2) * g**2``; ``p -= lr / (1 - b1**t) * m /
    (sqrt(v / (1 - b2**t)) + eps)``; ``target += (1 - momentum) * (p - target)``; ``copy = p``.

    Args:
        params, exp_avgs, exp_avg_sqs: float32 (or float64) tensors; moments start as zeros.
        grads: as many of the same shapes, any floating dtype.
        step: t, from 1. step, lr, grad_scale and momentum may be 0-dimensional tensors on the device of the parameters,
            so that a captured CUDA graph follows them.
        betas, eps, weight_decay: of AdamW; the decay for all, or one number per parameter.
        grad_scale: factor of all gradients: min(1, largest norm / norm) clips.
        targets: float32 (or float64) moving averages, None for a parameter without one, or None for none at all.
        momentum: of the moving averages, in [0, 1].
        copies: tensors of any floating dtype that receive the rounded parameter, None for a parameter without one.
        applied: 0-dimensional tensor on the device of the parameters; 0 or False: nothing is changed, whatever the
            gradients hold. None: as True.

    Raises: ValueError for lists, shapes or devices that do not fit and numbers out of range; TypeError for dtypes.
    Source: Loshchilov, Hutter, arXiv 1711.05101; He et al., "MoCo", arXiv 1911.05722, eq. 2. Default betas and weight
        decay: MAE, arXiv 2111.06377, table 8.
    """
    if not isinstance(params, (list, tuple)):
        raise fail("params", "a list of tensors", type(params).__name__, "pass a list", TypeError)
    targets, copies = (_some(name, t, len(params)) for name, t in (("targets", targets), ("copies", copies)))
    _check(params, grads, exp_avgs, exp_avg_sqs, targets, copies)
    if not params:
        return
    decays = list(weight_decay) if isinstance(weight_decay, (list, tuple)) else [weight_decay] * len(params)
    has_targets = any(t is not None for t in targets)
    _check_numbers(
        step, lr, betas, eps, decays, grad_scale, momentum, applied, has_targets, len(params), params[0].device
    )
    # A call per kind of tensors. What has no copy goes along with what has one.
    kinds = {copy.dtype for copy in copies if copy is not None}
    groups = defaultdict(list)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, targets, copies, decays, strict=True):
        param, grad, *_, copy, _ = tensors
        alone = next(iter(kinds)) if len(kinds) == 1 else None
        groups[param.dtype, grad.dtype, alone if copy is None else copy.dtype].append(tensors)
    numbers = (lr, betas, eps, grad_scale, momentum, applied)
    with torch.no_grad():
        for (dtype, _, copy_dtype), group in groups.items():
            *lists, group_decays = map(list, zip(*group, strict=True))
            device = lists[0][0].device
            if dtype == torch.float64 or dispatch.uses_reference("adamw", device, lists[1][0], copy_dtype):
                dispatch.reference("adamw").update(*lists, group_decays, step, *numbers)
            else:
                for column, kind in zip(lists[4:], (dtype, copy_dtype or dtype)):
                    # Where a parameter has no target, or no copy, stands an empty tensor.
                    none = torch.empty(0, dtype=kind, device=device)
                    column[:] = (none if t is None else t for t in column)
                ADAMW(*lists, step_numbers(step, *numbers, device), group_decays)


def step_numbers(step, lr, betas, eps, grad_scale, momentum, applied, device: torch.device) -> Tensor:
    """(9,) float64 on ``device``: lr, grad_scale, beta1, beta2, lr / (1 - b1**t), 1 / sqrt(1 - b2**t), eps, 1 - momentum,
    applied."""
    constant = torch.tensor if device.type == "cpu" else _filled

    def number(value: Number) -> Tensor:
        if isinstance(value, Tensor):
            return value.double()
        return constant(float(value), dtype=torch.float64, device=device)

    step, lr = number(step), number(lr)
    corrections = lr / (1 - betas[0] ** step), (1 - betas[1] ** step).rsqrt()
    share = 1 - number(1.0 if momentum is None else momentum)
    known = (number(n) for n in betas)
    return torch.stack(
        [lr, number(grad_scale), *known, *corrections, number(eps), share, number(True if applied is None else applied)]
    )


def _filled(value: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As a fill: a CUDA graph cannot capture a copy from the host."""
    return torch.full((), value, dtype=dtype, device=device)


def _some(name: str, tensors: Some, count: int) -> list[Tensor | None]:
    if tensors is not None and not isinstance(tensors, (list, tuple)):
        raise fail(name, "a list of tensors and None, or None", type(tensors).__name__, "pass a list", TypeError)
    return [None] * count if tensors is None else list(tensors)


def _check(params, grads, exp_avgs, exp_avg_sqs, targets, copies) -> None:
    check_tensors("params", params, len(params))
    for i, p in enumerate(params):
        check_written(f"params[{i}]", p)
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in named.items():
        check_tensors(name, tensors, len(params))
    named |= {"targets": targets, "copies": copies}
    for name, tensors in named.items():
        if len(tensors) != len(params):
            raise fail(name, f"{len(params)} tensors or None", len(tensors), "give one for each parameter")
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if t is None:
                continue
            what = f"{name}[{i}]"
            # The others' lists were looked through above.
            if name in ("targets", "copies"):
                check_tensor(what, t, "a tensor or None")
            if t.shape != p.shape or t.device != p.device or p.device != params[0].device:
                got = f"{tuple(t.shape)} on {t.device}"
                raise fail(what, f"{tuple(p.shape)} on {params[0].device} like params[{i}]", got, "check the order")
            if p.dtype not in (torch.float32, torch.float64) or not is_float(t):
                got = f"{p.dtype}, {t.dtype}"
                raise fail(f"params[{i}], {what}", "float32 parameters, floats", got, "convert them", TypeError)
            if name != "grads":
                check_written(what, t)
            if name not in ("grads", "copies") and t.dtype != p.dtype:
                raise fail(what, f"{p.dtype} like params[{i}]", t.dtype, "keep moments and averages in it", TypeError)


def _check_numbers(step, lr, betas, eps, decays, grad_scale, momentum, applied, has_targets, count, device) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise fail("betas", "two numbers in [0, 1)", shown(betas), "pass a tuple of two", TypeError)
    if len(decays) != count:
        raise fail("weight_decay", f"a number, or {count} of them", len(decays), "give one for each parameter")
    for name, value in (("eps", eps), ("betas", betas[0]), ("betas", betas[1]), *(("weight_decay", d) for d in decays)):
        check_number(name, value)
    decays = set(decays)
    for name, value in (("step", step), ("lr", lr), ("grad_scale", grad_scale), ("momentum", momentum)):
        if value is not None or name != "momentum":
            check_scalar(name, value, device)
    if applied is not None and not (isinstance(applied, Tensor) and applied.ndim == 0 and applied.device == device):
        raise fail("applied", f"a 0-dimensional tensor on {device}, or None", describe(applied), "pass one", TypeError)
    if not isinstance(step, Tensor) and not 1 <= step < float("inf"):
        raise fail("step", "the number of this step, from 1", step, "count before the call")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise fail("betas", "two numbers in [0, 1)", betas, "correct betas")
    sizes = (("lr", lr), ("eps", eps), ("grad_scale", grad_scale), *(("weight_decay", d) for d in decays))
    for name, value in sizes:
        if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
            raise fail(name, "a finite number, 0 or more", value, f"correct {name}")
    if has_targets and momentum is None:
        raise fail("momentum", "a number in [0, 1] beside targets", None, "pass it")
    if momentum is not None and not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise fail("momentum", "a number in [0, 1]", momentum, "correct the schedule")


ADAMW = define(
    "adamw",
    "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] targets, Tensor(e!)[] copies, Tensor numbers, float[] weight_decays) -> ()",
    lambda *arguments: None,
)
