"""What the tests of every method check in the same way."""

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import make_rng
from torch import Tensor

from fastmim.methods.base import Method, StepOutput


def assert_no_side_effects(method: Method, batch: Batch, rng: Tensor) -> StepOutput:
    """A pass forward and backward changes nothing but gradients, and draws nothing but what rng and ids give."""
    tensors = [*method.parameters(), *method.buffers(), *batch.crops, batch.ids, rng]
    before, generator = [t.clone() for t in tensors], torch.get_rng_state()
    output = method(batch, rng)
    output.loss.backward()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    return output


def others_of(batch: Batch, rng: Tensor) -> list[tuple[Batch, Tensor]]:
    """The same pixels at another step, with another seed, under other ids."""
    seed, step = rng.tolist()
    return [
        (batch, make_rng(seed, step + 1)),
        (batch, make_rng(seed + 1, step)),
        (Batch(batch.crops, batch.ids + 1), rng),
    ]


def assert_repeats(method: Method, batch: Batch, rng: Tensor) -> None:
    """Bit for bit, whatever torch's generator holds; another step, seed or id gives another loss."""
    first = method(batch, rng)
    torch.manual_seed(99)
    again = method(batch, rng)
    assert torch.equal(again.loss, first.loss)
    assert all(torch.equal(again.parts[name], part) for name, part in first.parts.items())
    for other, at in others_of(batch, rng):
        assert not torch.equal(method(other, at).loss, first.loss)


def assert_parts_average(method: Method, batch: Batch, rng: Tensor, size: int) -> None:
    """Losses and gradients of parts of `size` images average to those of the batch."""
    full = method(batch, rng).loss
    full.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters()}
    method.zero_grad()
    parts = [Batch(tuple(crops), ids) for *crops, ids in zip(*(x.split(size) for x in (*batch.crops, batch.ids)))]
    losses = []
    for part in parts:
        loss = method(part, rng).loss
        (loss / len(parts)).backward()
        losses.append(loss.item())
    assert len(parts) > 1 and sum(losses) / len(parts) == pytest.approx(full.item(), rel=1e-6)
    for name, parameter in method.named_parameters():
        error = (parameter.grad - gradients[name]).norm()
        assert error <= 1e-4 * gradients[name].norm() + 1e-6, name


def waves(count: int) -> Tensor:
    """Gray pictures of 16 x 16 pixels, uint8 (count, 1, 16, 16): sine waves of any direction and phase."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    a, b, c = torch.rand(3, count, 1, 1, 1)
    return (127 + 120 * torch.sin(0.5 * a * x + 0.5 * b * y + 6 * c)).to(torch.uint8)


def learn(method: Method, batch: Batch, *, steps: int, peak: float, betas=(0.9, 0.999)) -> list[dict[str, float]]:
    """Loss, its parts and measures at each step on one batch, whose masks and flips never change."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=peak, betas=betas)
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / 20) * (1 - step / steps)
        output = method(batch, make_rng(step=0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append({name: x.item() for name, x in (output.parts | output.measures | {"loss": output.loss}).items()})
    return history
