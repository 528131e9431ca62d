"""Projection heads: against loops, against torch's batch norm, and over two real processes."""

import math

import pytest
import torch
from slow_reference import batch_norm, doubles, head, head_case, scramble, two_rank_results
from torch import nn

from fastmim.heads import ProjectionHead, SyncBatchNorm


@pytest.mark.parametrize("shape", [(2, 3), (7, 16), (64, 5)], ids=str)
def test_batch_norm_equals_loops_and_torch_in_training(shape):
    """Values and gradients of input, weight and bias; eps 1e-6, biased variance."""
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(shape[1]), nn.BatchNorm1d(shape[1], eps=1e-6)
    scramble(ours)
    theirs.load_state_dict(
        ours.state_dict() | {k: v for k, v in theirs.state_dict().items() if "running" in k or "num" in k}
    )
    x = torch.randn(shape) * 3 + 5
    weight = torch.randn(shape)
    results = []
    for module in (ours, theirs.train()):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * weight).sum().backward()
        results.append([out.detach(), leaf.grad, module.weight.grad, module.bias.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    slow = batch_norm(x.double(), ours.weight.detach().double(), ours.bias.detach().double())
    torch.testing.assert_close(results[0][0].double(), slow, rtol=1e-5, atol=1e-5)


def test_batch_norm_eps_is_1e_6():
    """Columns whose variance is the eps: the result halves the variance, so eps is neither 1e-5 nor absent."""
    x = torch.tensor([[-1e-3], [1e-3]])
    out = SyncBatchNorm(1)(x)
    torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0]]) / math.sqrt(2), rtol=1e-4, atol=0)


def test_batch_norm_keeps_no_running_statistics():
    module = SyncBatchNorm(4)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert (module.weight == 1).all() and not module.bias.any()
    x = torch.randn(6, 4)
    training = module(x)
    assert torch.equal(module.eval()(x), training)


def test_batch_norm_computes_in_float32_under_autocast():
    """A large mean: bf16 would lose the differences."""
    x = torch.randn(16, 4) + 1000
    module = SyncBatchNorm(4)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_projection_head_equals_loops():
    module, x, _ = head_case()
    torch.testing.assert_close(module(x).double(), head(doubles(module), x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width, hidden, out", [(768, 1536, 256), (256, 1536, 256), (1024, 1536, 256), (12, 20, 5)])
def test_projection_head_has_one_norm_and_no_last_bias(width, hidden, out):
    with torch.device("meta"):
        module = ProjectionHead(width, hidden, out)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "0.weight": (hidden, width), "0.bias": (hidden,), "1.weight": (hidden,), "1.bias": (hidden,),
        "3.weight": (out, hidden),
    }  # fmt: skip
    assert module[1].eps == 1e-6 and isinstance(module[2], nn.ReLU)


def test_projection_head_keeps_torch_s_default_initialization():
    """Uniform within 1 / sqrt(fan-in), biases too (not Xavier, not 0)."""
    torch.manual_seed(0)
    module = ProjectionHead(100, 400, 50)
    for tensor, fan_in in ((module[0].weight, 100), (module[0].bias, 100), (module[3].weight, 400)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.97 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_projection_head_over_two_processes_equals_the_full_batch():
    """gloo, 4 rows each: outputs, input gradients, and summed parameter gradients of a summed loss."""
    ranks = two_rank_results()
    module, x, weight = head_case()
    x.requires_grad_()
    out = module(x)
    (out * weight).sum().backward()
    torch.testing.assert_close(torch.cat([r["head"] for r in ranks]), out.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([r["head_input_grad"] for r in ranks]), x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in module.named_parameters():
        both = sum(r[f"head_grad.{name}"] for r in ranks)
        torch.testing.assert_close(both, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_projection_head_over_two_processes_differs_from_two_separate_batches():
    """The case can tell synchronized from local statistics."""
    module, x, _ = head_case()
    local = torch.cat([module(x[:4]), module(x[4:])]).detach()
    assert (torch.cat([r["head"] for r in two_rank_results()]) - local).abs().max() > 0.05
