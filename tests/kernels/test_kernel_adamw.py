"""The AdamW step against torch.optim.AdamW, clip_grad_norm_, a moving average and a copy, over several steps."""

import copy

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import dispatch
from torch import nn

BACKENDS = dispatch.available("adamw", "cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5, bias=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_tensor", [False, True], ids=["numbers", "tensors"])
def test_steps_are_those_of_torch(backend, is_tensor, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    theirs, ours = network().double(), network()
    average = copy.deepcopy(theirs)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1, eps=1e-6)
    params = [p.detach() for p in ours.parameters()]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    targets, copies = [p.clone() for p in params], [p.bfloat16() for p in params]
    number = torch.tensor if is_tensor else float
    for step in range(1, 6):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (10 * theirs(x).square().sum()).backward()
        grads = [p.grad.float() for p in theirs.parameters()]
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), theirs.parameters(), strict=True):
                a.lerp_(p, 1 - 0.9)
        fk.adamw_ema(
            params, grads, *moments, step=torch.tensor(step) if is_tensor else step, lr=number(1e-2), betas=(0.8, 0.99),
            eps=1e-6, weight_decay=0.1, grad_scale=number(1 / (norm.item() + 1e-6)), targets=targets,
            momentum=number(0.9), copies=copies,
        )  # fmt: skip
    for p, target, rounded, t, a in zip(
        params, targets, copies, theirs.parameters(), average.parameters(), strict=True
    ):
        torch.testing.assert_close(p.double(), t.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(target.double(), a.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(rounded, p.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_any_layout_and_kind_in_one_call(backend, monkeypatch):
    """Strided, channels-last, of float64; with and without an average or a copy."""
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    params = [draw(4, 6)[:, ::2], draw(2, 3, 4, 4).to(memory_format=torch.channels_last), draw(5).double(), draw(0, 3)]
    grads = [
        draw(*p.shape).to(d) for p, d in zip(params, (torch.float32, torch.bfloat16, torch.float32, torch.float32))
    ]
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]
    targets = [None, params[1].clone() + 1, params[2].clone(), None]
    copies = [params[0].bfloat16(), None, None, None]
    before = [p.clone() for p in params]
    fk.adamw_ema(
        params, grads, first, second, step=1, lr=0.1, weight_decay=0.5, eps=0.0, targets=targets, momentum=0.75,
        copies=copies,
    )  # fmt: skip
    # The first step of Adam has the gradient's sign and the size of the rate.
    for p, b, grad in zip(params, before, grads, strict=True):
        torch.testing.assert_close(p, b * 0.95 - 0.1 * grad.sign().to(p.dtype), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets[1], 0.75 * (before[1] + 1) + 0.25 * params[1])
    assert torch.equal(copies[0], params[0].bfloat16())


def test_average_equal_to_its_parameter_stays_equal():
    p = torch.linspace(-1, 1, 40)
    target, zero = p.clone(), torch.zeros(40)
    fk.adamw_ema(
        [p],
        [torch.zeros(40)],
        [zero.clone()],
        [zero],
        step=1,
        lr=0.1,
        weight_decay=0.0,
        targets=[target],
        momentum=0.996,
    )
    assert torch.equal(target, p)
