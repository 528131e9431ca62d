"""AdamW with the weight-decay groups of a method, moving averages and low-precision copies; gradient norm, clipping."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from fastmim_kernels import adamw_ema
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW, its state under the same names, with all that follows a step in the same pass.

    Parameters whose first step was the same one share its count, so that all are updated by one launch.
    """

    @torch.no_grad()
    def step(
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        applied: Tensor | None = None,
        targets: Mapping[Tensor, Tensor] | None = None,
        momentum: float | Tensor | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Updates the parameters that have a gradient.

        Args:
            closure: not supported.
            grad_scale: factor of all gradients.
            applied: 0-d bool; False: nothing is changed. None: unless `found_inf` was set, as torch's fused AdamW takes it.
            targets, momentum: parameter -> its moving average.
            copies: parameter -> tensor that receives it, rounded.
        """
        if closure is not None:
            raise ValueError("closure: expected None, got a function; compute the gradient before the step")
        if applied is None and getattr(self, "found_inf", None) is not None:
            applied = self.found_inf == 0
        # A call per count and per group of settings; decays differ within a call.
        calls: dict[tuple, list[tuple[Tensor, float]]] = defaultdict(list)
        fresh = None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    fresh = torch.zeros((), device=p.device) if fresh is None else fresh
                    self.state[p].update(step=fresh, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                count = self.state[p]["step"]
                calls[count, group["lr"], group["betas"], group["eps"]].append((p, group["weight_decay"]))
        for count in {id(count): count for count, *_ in calls}.values():
            count.add_(1 if applied is None else applied)
        targets, copies = targets or {}, copies or {}
        for (count, lr, betas, eps), rows in calls.items():
            params, decays = map(list, zip(*rows))
            adamw_ema(
                params, [p.grad for p in params], *([self.state[p][name] for p in params] for name in MOMENTS),
                step=count, lr=lr, betas=betas, eps=eps, weight_decay=decays, grad_scale=grad_scale,
                targets=[targets.get(p) for p in params], momentum=momentum, copies=[copies.get(p) for p in params],
                applied=applied,
            )  # fmt: skip


def adamw(
    model: nn.Module,
    no_decay: Callable[[str, Tensor], bool],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> AdamW:
    """AdamW over the trainable parameters, in two groups: decayed, and spared where `no_decay(name, p)`."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if no_decay(name, parameter) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def clip_gradients(parameters: list[Tensor], largest: float | None) -> Tensor:
    """Scales all gradients so that their joint norm is at most `largest`; returns the norm before, on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm


def clip_scale(norm: Tensor, largest: float | None) -> Tensor | float:
    """The factor of gradients of that joint norm by which `clip_gradients` scales them."""
    return 1.0 if largest is None else (largest / (norm + 1e-6)).clamp(max=1.0)
