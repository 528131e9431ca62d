"""AdamW with the weight-decay groups of a method, gradient norm and clipping."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adamw(
    model: nn.Module,
    no_decay: Callable[[str, Tensor], bool],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, in two groups: decayed, and spared where `no_decay(name, p)`."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (spared if no_decay(name, parameter) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def clip_gradients(parameters: list[Tensor], largest: float | None) -> Tensor:
    """Scales all gradients so that their joint norm is at most `largest`; returns the norm before, on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm
