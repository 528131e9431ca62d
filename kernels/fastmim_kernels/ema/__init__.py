"""Exponential moving average of parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_scalar, check_tensors, check_written, fail, is_float
from ..registration import define

__all__ = ["ema_update"]


def ema_update(targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Move every target towards its online tensor, in place: ``t += (1 - momentum) * (o - t)``, with no gradient.

    In plain torch: ``torch._foreach_lerp_(targets, onlines, 1 - momentum)``, with ``onlines`` in the dtype of ``targets``.
    That form is computed as written, with one fused multiply-add where the machine has it (momentum > 0.5; below, the
    same up to rounding), so that a target equal to its online tensor stays exactly equal.

    Args:
        targets: float32 (or float64) tensors: at momentum 0.996 most increments are lost in bfloat16.
        onlines: as many tensors of the same shapes and device, any floating dtype.
        momentum: in [0, 1]; a 0-dimensional tensor on the device of the targets avoids a constant in a captured CUDA
            graph. Where they are on several devices, it is copied to each.

    Raises: ValueError for lists, shapes or devices that differ or momentum out of range; TypeError for other dtypes.
    Source: He et al., "MoCo", arXiv 1911.05722, eq. 2; theta_t = m theta_t + (1 - m) theta_o.
    """
    check_tensors("targets", targets, len(targets) if isinstance(targets, (list, tuple)) else 0)
    check_tensors("onlines", onlines, len(targets))
    for i, (t, o) in enumerate(zip(targets, onlines, strict=True)):
        check_written(f"targets[{i}]", t)
        if t.shape != o.shape or t.device != o.device:
            got = f"{tuple(o.shape)} on {o.device}"
            raise fail(
                f"onlines[{i}]", f"{tuple(t.shape)} on {t.device} like its target", got, "check the order of the pairs"
            )
        if t.dtype not in (torch.float32, torch.float64) or not is_float(o):
            raise fail(
                f"targets[{i}]",
                "float32 and a floating online tensor",
                f"{t.dtype}, {o.dtype}",
                "keep targets in float32",
                TypeError,
            )
    if not targets:
        return
    devices = dict.fromkeys(t.device for t in targets)
    if len(devices) > 1:
        for device in devices:
            own = [pair for pair in zip(targets, onlines, strict=True) if pair[0].device == device]
            ema_update(
                *map(list, zip(*own, strict=True)), momentum.to(device) if isinstance(momentum, Tensor) else momentum
            )
        return
    check_scalar("momentum", momentum, targets[0].device)
    if not isinstance(momentum, Tensor) and not 0 <= momentum <= 1:
        raise fail("momentum", "a number in [0, 1]", momentum, "correct the schedule")
    # Tensors of float64 are left to the reference inside.
    if dispatch.uses_reference("ema", targets[0].device):
        dispatch.reference("ema").ema_update(targets, onlines, momentum)
        return
    with torch.no_grad():
        if isinstance(momentum, Tensor):
            weight = (1 - momentum).to(torch.float32)
        else:
            weight = torch.full((), 1 - momentum, dtype=torch.float32, device=targets[0].device)
        EMA(list(targets), list(onlines), weight)


EMA = define(
    "ema",
    "ema_update(Tensor(a!)[] targets, Tensor[] onlines, Tensor weight) -> ()",
    lambda targets, onlines, weight: None,
)
