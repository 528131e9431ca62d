"""Gradients in bfloat16 against those in float32, whole, for every method."""

import pytest
import torch
from slow_reference import make_rng, model_spec
from test_accumulation import OPTIONS, distance, make_batch
from torch import Tensor, nn

from fastmim.methods import base
from fastmim.methods.base import Method

STEPS = range(4)


class Gate(nn.Module):
    """ReLU that can be told which of its inputs count as positive."""

    def __init__(self) -> None:
        super().__init__()
        self.signs: list[Tensor] = []
        self.is_given = False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_given:
            return x * self.signs.pop(0)
        self.signs.append(x.detach() > 0)
        return x.relu()


def give_gates(method: Method) -> list[Gate]:
    """Puts gates in the place of all ReLUs."""
    gates = []
    for part in list(method.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                gates.append(Gate())
                setattr(part, name, gates[-1])
    return gates


def build(name: str, **options) -> Method:
    module = base.find(name)
    return base.build(name, model_spec(), module.Config(**(OPTIONS[name] | options)), 0)


def gradients(method: Method, step: int, *, low: bool) -> dict[str, Tensor]:
    method.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = method(make_batch(method), make_rng(step=step)).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


def errors(method: Method, *, same_signs: bool) -> list[float]:
    """Relative distance of the whole gradient at some steps."""
    gates, found = give_gates(method), []
    for step in STEPS:
        for gate in gates:
            gate.signs, gate.is_given = [], False
        exact = gradients(method, step, low=False)
        for gate in gates:
            gate.is_given = same_signs
        found.append(distance(gradients(method, step, low=True), exact))
    return found
