"""Moving averages: pairing by name, the start, and CMAE's pairs."""

import pytest
import torch
from slow_reference import make_batch, make_rng, small_cmae
from torch import nn

from fastmim.ema import EmaPair, module_pairs, start_target
from fastmim.engine.base import EngineSpec
from fastmim.engine.single import SingleEngine


@pytest.fixture
def cmae_method(small):
    return small_cmae()


def test_module_pairs_match_names_not_order():
    online = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(3, 2), "only_here": nn.Linear(4, 4)})
    target = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 3)})
    pairs = module_pairs(online, target)
    expected = [(online[k].get_parameter(p), target[k].get_parameter(p)) for k in "ab" for p in ("weight", "bias")]
    assert [(id(p.online), id(p.target)) for p in pairs] == [(id(o), id(t)) for o, t in expected]
    assert all(isinstance(pair, EmaPair) for pair in pairs)


@pytest.mark.parametrize("target", [nn.Linear(2, 4), nn.Linear(2, 3)], ids=["other_shape", "no_partner"])
def test_module_pairs_refuse_a_target_without_partner(target):
    online = nn.Linear(2, 3, bias=False)
    with pytest.raises(ValueError, match="ema: expected an online parameter"):
        module_pairs(online, target)


def test_start_target_copies_and_freezes_without_sharing():
    online, target = nn.Linear(2, 3), nn.Linear(2, 3)
    start_target(online, target)
    assert torch.equal(online.weight, target.weight) and torch.equal(online.bias, target.bias)
    assert online.weight.data_ptr() != target.weight.data_ptr()
    assert not any(p.requires_grad for p in target.parameters()) and all(p.requires_grad for p in online.parameters())


def test_cmae_pairs_cover_exactly_the_target_networks(cmae_method):
    names = {id(p): n for n, p in cmae_method.named_parameters()}
    pairs = [(names[id(p.online)], names[id(p.target)]) for p in cmae_method.ema_pairs()]
    targets = [target for _, target in pairs]
    assert len(set(targets)) == len(targets)
    assert set(targets) == {n for n in names.values() if n.startswith("target_")}
    assert all(target == f"target_{online}" for online, target in pairs)
    left_out = {n for n in names.values() if n.startswith(("encoder.", "projector."))} - {online for online, _ in pairs}
    assert left_out == {"encoder.norm.weight", "encoder.norm.bias"}
    assert any(online.startswith("projector.1.") for online, _ in pairs), "batch norm's weights are averaged, too"
    assert not any("predictor" in name or "decoder" in name for pair in pairs for name in pair)


def test_cmae_momentum_is_constant(cmae_method):
    assert [cmae_method.momentum(p) for p in (0.0, 0.3, 1.0)] == [0.996] * 3


def test_cmae_target_follows_the_weights_after_the_step(cmae_method):
    """Engine order: optimizer, then target <- .996 target + .004 new online; nothing else of the target moves."""
    spec = EngineSpec(torch.device("cpu"), "fp32", 1, 4, 1e-2, 0.05, (0.9, 0.95), None, 0)
    engine = SingleEngine(cmae_method, spec)
    pairs = cmae_method.ema_pairs()
    before = [(p.online.detach().clone(), p.target.clone()) for p in pairs]
    engine.backward(engine.forward(make_batch(cmae_method), make_rng()).loss)
    engine.step(pairs, cmae_method.momentum(0.0))
    moved = 0
    for pair, (online, target) in zip(pairs, before):
        moved += not torch.equal(pair.online, online)
        expected = 0.996 * target.double() + 0.004 * pair.online.detach().double()
        torch.testing.assert_close(pair.target.double(), expected, rtol=1e-6, atol=1e-7)
    assert moved == len(pairs)
