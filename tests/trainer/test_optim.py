"""Weight-decay groups of the methods, AdamW against its formula, clipping."""

import math

import pytest
import torch
from slow_reference import make_batch, make_rng, model_spec, small_cmae
from torch import nn

from fastmim.engine.base import EngineSpec
from fastmim.engine.single import SingleEngine
from fastmim.heads import SyncBatchNorm
from fastmim.methods import mae
from fastmim.optim import adamw, clip_gradients, clip_scale

pytestmark = pytest.mark.usefixtures("small")
RECIPE = dict(lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))


def build_mae():
    return mae.MAE(model_spec(), mae.Config(decoder_width=32, decoder_depth=1, decoder_heads=4))


def decayed_names(method) -> tuple[set[str], set[str]]:
    """(decayed, spared) names, from the optimizer itself."""
    names = {id(p): n for n, p in method.named_parameters()}
    optimizer = adamw(method, method.no_decay, **RECIPE)
    found = {0.05: set(), 0.0: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    return found[0.05], found[0.0]


def names_of(method, *kinds: type) -> set[str]:
    """Names of the trained parameters that belong to modules of the given kinds."""
    return {
        f"{name}.{parameter_name}"
        for name, part in method.named_modules()
        if isinstance(part, kinds)
        for parameter_name, parameter in part.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def test_mae_decays_matrices_and_tokens_only():
    """timm's rule: more than one dimension and no bias; the tokens are (1, 1, D), so they are decayed."""
    method = build_mae()
    decayed, spared = decayed_names(method)
    biases = {n for n, _ in method.named_parameters() if n.endswith("bias")}
    assert spared == names_of(method, nn.LayerNorm) | biases
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.weight"} <= decayed
    assert decayed | spared == {n for n, _ in method.named_parameters()} and not decayed & spared


def test_cmae_spares_layer_norms_biases_and_tokens_but_decays_batch_norm_weights():
    method = small_cmae()
    decayed, spared = decayed_names(method)
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    biases = {n for n in trained if n.endswith("bias")}
    tokens = {"encoder.cls_token", "pixel_decoder.mask_token", "feature_decoder.mask_token"}
    assert spared == names_of(method, nn.LayerNorm) | biases | tokens
    assert {"projector.1.weight", "predictor.1.weight"} <= decayed
    assert names_of(method, SyncBatchNorm) & spared == {"projector.1.bias", "predictor.1.bias"}
    assert decayed | spared == trained and not decayed & spared


def test_cmae_optimizer_leaves_out_the_target_networks():
    method = small_cmae()
    found = {n for group in decayed_names(method) for n in group}
    assert not any(n.startswith("target_") for n in found)
    assert len(found) == sum(1 for n, _ in method.named_parameters() if not n.startswith("target_"))


def test_adamw_settings_are_the_recipe_s():
    optimizer = adamw(build_mae(), lambda name, p: p.ndim <= 1, **RECIPE)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["lr"] == 1e-3
        assert not group["amsgrad"] and not group["maximize"]


def test_adamw_steps_follow_the_formula():
    """Three steps in float64: decoupled decay, bias-corrected moments, eps outside of the root."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rows = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    moments = {n: [torch.zeros_like(r), torch.zeros_like(r)] for n, r in rows.items()}
    optimizer = adamw(model, lambda name, p: name == "bias", lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            # The last gradients are tiny: eps decides.
            parameter.grad = torch.randn(parameter.shape) * (1e-8 if step == 3 else 1)
            g = parameter.grad.double()
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.95).add_(0.05 * g * g)
            rows[name] *= 1 - 0.1 * (0.5 if name == "weight" else 0.0)
            rows[name] -= 0.1 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), rows[name], rtol=1e-5, atol=1e-6)


def test_averages_copies_and_clipping_follow_in_the_same_step():
    """Beside torch's own AdamW on scaled gradients; the second step is skipped, and does not count."""
    torch.manual_seed(0)
    model, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(model.state_dict())
    ours = adamw(model, lambda name, p: name == "bias", lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    plain = torch.optim.AdamW(
        [dict(params=[theirs.weight], weight_decay=0.5), dict(params=[theirs.bias], weight_decay=0.0)],
        lr=0.1, betas=(0.9, 0.95),
    )  # fmt: skip
    average, expected = torch.zeros(2, 3), torch.zeros(2, 3)
    copy = torch.empty(2, 3, dtype=torch.bfloat16)
    for step in range(4):
        for p, other in zip(model.parameters(), theirs.parameters()):
            p.grad = torch.randn(p.shape) if step != 1 else torch.full(p.shape, math.nan)
            other.grad = 0.25 * p.grad
        ours.step(
            grad_scale=torch.tensor(0.25), applied=torch.tensor(step != 1), targets={model.weight: average},
            momentum=0.75, copies={model.weight: copy},
        )  # fmt: skip
        if step != 1:
            plain.step()
            expected.lerp_(theirs.weight.detach(), 0.25)
        for p, other in zip(model.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)
            assert ours.state[p]["step"].item() == plain.state[other]["step"].item()
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, model.weight.bfloat16())


def test_a_parameter_that_joins_later_has_a_count_of_its_own():
    """As in torch, whose first step of a parameter is that with its first gradient."""
    model, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(model.state_dict())
    ours = adamw(model, lambda name, p: False, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    for step in range(3):
        for own, other in ((model.weight, theirs.weight), (model.bias, theirs.bias))[: 1 + (step > 0)]:
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        ours.step()
        plain.step()
    for p, other in zip(model.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


def test_adamw_with_rate_0_changes_nothing():
    """MAE's first step."""
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = adamw(model, lambda name, p: False, lr=0.0, weight_decay=0.5, betas=(0.9, 0.95))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_rounded_weights_of_the_engine_are_never_stale():
    """With and without them: the same losses after steps and after weights were written by others."""
    losses = []
    for has_copies in (True, False):
        torch.manual_seed(0)
        method = build_mae()
        initial = {name: p.clone() for name, p in method.state_dict().items()}
        engine = SingleEngine(method, EngineSpec(torch.device("cpu"), "bf16", 2, 2, 1e-2, 0.05, (0.9, 0.95), None, 0))
        assert len(engine.copies) > 5
        if not has_copies:
            engine.copies = {}
        found = []
        for step in range(4):
            if step == 3:
                method.load_state_dict(initial)
            for _ in range(2):
                out = engine.forward(make_batch(method, seed=step), make_rng(step=step))
                engine.backward(out.loss)
                found.append(out.loss.item())
            engine.step()
        losses.append(found)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


@pytest.mark.parametrize("largest", [None, 100.0, 0.5])
def test_clip_gradients_scales_the_joint_norm_and_returns_the_one_before(largest):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2,))]
    for p in parameters[:2]:
        p.grad = torch.randn(p.shape)
    before = [p.grad.double() for p in parameters[:2]]
    norm = math.sqrt(sum(float((g * g).sum()) for g in before))
    assert 0.5 < norm < 100
    scale = 1.0 if largest is None else min(1.0, largest / norm)
    assert float(clip_scale(torch.tensor(norm), largest)) == pytest.approx(scale, rel=1e-5)
    assert clip_gradients(parameters, largest).item() == pytest.approx(norm, rel=1e-5)
    for p, g in zip(parameters, before):
        torch.testing.assert_close(p.grad.double(), g * scale, rtol=1e-4, atol=0)
    assert parameters[2].grad is None
