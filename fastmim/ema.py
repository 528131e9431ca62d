"""Exponential moving averages of networks: which tensors follow which."""

from typing import NamedTuple

from torch import Tensor, nn


class EmaPair(NamedTuple):
    """`target` follows `online`: target <- momentum x target + (1 - momentum) x online."""

    online: Tensor
    target: Tensor


def module_pairs(online: nn.Module, target: nn.Module) -> list[EmaPair]:
    """Pairs the parameters of two modules by name; the online one may have more.

    Raises:
        ValueError: if a parameter of the target has no partner of its shape.
    """
    partners = dict(online.named_parameters())
    pairs = []
    for name, parameter in target.named_parameters():
        partner = partners.get(name)
        if partner is None or partner.shape != parameter.shape:
            raise ValueError(f"ema: expected an online parameter {name} {tuple(parameter.shape)}, got {partner}")
        pairs.append(EmaPair(partner, parameter))
    return pairs


def start_target(online: nn.Module, target: nn.Module) -> None:
    """Copies the online weights into the target and freezes it."""
    for pair in module_pairs(online, target):
        pair.target.data.copy_(pair.online.data)
    target.requires_grad_(False)
