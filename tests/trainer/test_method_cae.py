"""CAE against a slow re-computation in float64: both targets, and every branch."""

import fastmim_kernels as fk
import pytest
import torch
from slow_cae import (
    DEPTH,
    HEADS,
    IDS,
    SHAPES,
    WIDTH,
    Brightness,
    build,
    make_batch,
    slow_regress,
    slow_terms,
    tokens_of,
)
from slow_reference import assert_same_gradients, doubles, draw_flips, make_rng, model_spec, position_table, scramble

from fastmim.methods import cae

# ---- the whole method


# 24 patches: 12 masked, blocks from round(16 / 196 * 24) = 2.
CASE = dict(min_block=2, masked=12)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_cae_losses_and_gradients_equal_the_slow_recomputation(small, shape, target):
    tokenizer = Brightness() if target == "tokens" else None
    method = build(shape, tokenizer=tokenizer)
    batch, rng = make_batch(method), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    output = method(batch, rng)
    weights = doubles(method)
    tokens = None if tokenizer is None else tokens_of(tokenizer, batch, rng)
    decoded, align, accuracy = slow_terms(method, weights, batch, rng, tokens=tokens, **CASE)
    name = "pixel" if tokenizer is None else "token"
    assert set(output.parts) == {name, "align"}
    assert output.parts[name].item() == pytest.approx(decoded.item(), rel=1e-5)
    assert output.parts["align"].item() == pytest.approx(align.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((decoded + align).item(), rel=1e-5)
    if tokenizer is not None:
        assert output.measures["mlm_acc"].item() == pytest.approx(accuracy, rel=1e-6)
        assert len(set(tokens.flatten().tolist())) > 5
    assert not any(t.requires_grad for t in [*output.parts.values(), *output.measures.values()])
    output.loss.backward()
    (decoded + align).backward()
    assert_same_gradients(method, weights)


def test_cae_with_another_decoder_width_projects_both_branches(small):
    method = build(decoder_width=36, decoder_heads=HEADS, regressor_depth=1, decoder_depth=2)
    assert method.decoder.head.in_features == 36 and method.regressor.mask_token.shape == (1, 1, 36)
    batch, rng = make_batch(method), make_rng()
    output, weights = method(batch, rng), doubles(method)
    decoded, align, _ = slow_terms(method, weights, batch, rng, depths=(1, 2), **CASE)
    assert output.parts["pixel"].item() == pytest.approx(decoded.item(), rel=1e-5)
    assert output.parts["align"].item() == pytest.approx(align.item(), rel=1e-5)
    output.loss.backward()
    (decoded + align).backward()
    assert_same_gradients(method, weights)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_without_decoder_predicts_from_the_regressors_latents(small, target):
    tokenizer = Brightness() if target == "tokens" else None
    method = build(decoder_depth=0, align_weight=0.0, tokenizer=tokenizer)
    assert [n for n, _ in method.decoder.named_parameters()] == ["head.weight", "head.bias"]
    batch, rng = make_batch(method), make_rng()
    tokens = None if tokenizer is None else tokens_of(tokenizer, batch, rng)
    output, weights = method(batch, rng), doubles(method)
    decoded, _, _ = slow_terms(method, weights, batch, rng, depths=(2, 0), tokens=tokens, **CASE)
    assert output.loss.item() == pytest.approx(decoded.item(), rel=1e-5)
    output.loss.backward()
    decoded.backward()
    assert_same_gradients(method, weights)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_with_random_masks_and_plain_pixels_equals_the_slow_recomputation(small, target):
    tokenizer = Brightness() if target == "tokens" else None
    method = build(mask="random", norm_pix=False, tokenizer=tokenizer)
    batch, rng = make_batch(method), make_rng()
    tokens = None if tokenizer is None else tokens_of(tokenizer, batch, rng)
    output, weights = method(batch, rng), doubles(method)
    case = dict(min_block=None, masked=12, normalize=False)
    decoded, align, _ = slow_terms(method, weights, batch, rng, tokens=tokens, **case)
    assert output.parts["align"].item() == pytest.approx(align.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((decoded + align).item(), rel=1e-5)
    assert output.loss.item() != pytest.approx(build(tokenizer=tokenizer)(batch, rng).loss.item(), rel=1e-3)
    output.loss.backward()
    (decoded + align).backward()
    assert_same_gradients(method, weights)


def test_cae_without_stochastic_depth_equals_the_slow_recomputation(small):
    method = build(drop_path=0.0)
    batch, rng = make_batch(method), make_rng()
    decoded, align, _ = slow_terms(method, doubles(method), batch, rng, peak=0.0, **CASE)
    assert method(batch, rng).loss.item() == pytest.approx((decoded + align).item(), rel=1e-5)


def test_cae_weighs_the_alignment(small):
    batch, rng = make_batch(build()), make_rng()
    two, five = build()(batch, rng), build(align_weight=5.0)(batch, rng)
    assert five.parts["align"].item() == pytest.approx(2.5 * two.parts["align"].item(), rel=1e-6)
    assert five.loss.item() == pytest.approx(sum(v.item() for v in five.parts.values()), rel=1e-6)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_in_bf16_is_near_float32_and_every_parameter_learns(small, target):
    """Autocast keeps the copies of weights that it makes: the pass without gradient must not make the first ones."""
    results = {}
    for precision in ("fp32", "bf16"):
        method = build(tokenizer=Brightness() if target == "tokens" else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = method(make_batch(method), make_rng())
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        results[precision] = output.loss.item(), {n: p.grad for n, p in method.named_parameters()}
    assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=2e-2)
    largest = max(g.norm() for g in results["fp32"][1].values())
    for name, exact in results["fp32"][1].items():
        low = results["bf16"][1][name]
        assert low is not None and low.any(), name
        assert (low - exact).norm() < 0.1 * exact.norm() + 1e-3 * largest, name


# ---- the alignment branch


def test_cae_target_branch_gets_no_gradient(small):
    """Exactly the gradients of a constant target; those of a trained target are others."""
    method = build()
    batch, rng = make_batch(method), make_rng()
    drops = cae.random_drop_path(rng, batch.ids, 0.4, *method.depths)
    target = method._encode_masked(batch.crops[0], method.mask(rng, batch.ids), drops[1])
    assert not target.requires_grad and target.grad_fn is None
    method(batch, rng).loss.backward()
    grads = {}
    for cut in (True, False):
        weights = doubles(method)
        decoded, align, _ = slow_terms(method, weights, batch, rng, cut=cut, **CASE)
        (decoded + align).backward()
        grads[cut] = weights["encoder.blocks.0.fc1.weight"].grad
    ours = method.encoder.blocks[0].fc1.weight.grad.double()
    assert (ours - grads[True]).norm() < 1e-4 * grads[True].norm()
    assert (ours - grads[False]).norm() > 1e-2 * grads[False].norm(), "the case can tell"


def test_cae_target_is_the_same_encoder_without_lag_on_masked_patches_only(small, monkeypatch):
    """One set of weights; the second call sees class token and masked patches, with drop path draws of its own."""
    calls = []
    method = build()
    real = method.encoder.forward

    def spy(patches, ids, drop):
        calls.append((patches, ids, drop, torch.is_grad_enabled()))
        return real(patches, ids, drop=drop)

    monkeypatch.setattr(method.encoder, "forward", spy)
    batch, rng = make_batch(method), make_rng()
    method(batch, rng)
    (_, keep, drop_keep, grad_keep), (_, masked, drop_masked, grad_masked) = calls
    plan = method.mask(rng, batch.ids)
    assert torch.equal(keep, plan.ids_keep) and torch.equal(masked, plan.ids_masked)
    assert grad_keep and not grad_masked
    assert drop_keep.shape == drop_masked.shape == (4, DEPTH, 2) and not torch.equal(drop_keep, drop_masked)
    assert [n for n, _ in method.named_children()] == ["encoder", "bridge", "regressor", "decoder"]
    assert method.ema_pairs() == []


def test_cae_alignment_of_equal_latents_is_0(small):
    method = build()
    latent = torch.randn(4, 12, WIDTH)
    method._predict = lambda *args, **kwargs: latent
    method._encode_masked = lambda *args, **kwargs: latent
    assert method(make_batch(method), make_rng()).parts["align"].item() == 0


def test_cae_visible_latents_are_regressed_without_the_class_token(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    given = []
    method.regressor.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    method(batch, rng)
    assert given[0].shape == (4, 12, WIDTH)
    method.zero_grad()
    method(batch, rng).loss.backward()
    assert method.encoder.cls_token.grad.abs().sum() > 0, "it learns through attention"


# ---- the regressor


@pytest.mark.parametrize("depth", [1, 4])
def test_cae_regressor_equals_the_naive_formula(small, depth):
    torch.manual_seed(1)
    model = model_spec(20, 28, 4)
    regressor = cae.Regressor(model, 24, 4, depth, 0.1)
    cae.initialize(regressor)
    scramble(regressor, 2, 0.3)
    plan = fk.block_masking(make_rng(), torch.arange(3), model.grid, 17, min_block=3)
    visible = torch.randn(3, 18, 24)
    drop = torch.rand(3, depth, 2) * 2
    got = regressor(visible, plan, drop)
    table = position_table(24, model.grid, "row")[1:]
    for b in range(3):
        arguments = (doubles(regressor), visible[b].double(), table[plan.ids_keep[b]], table[plan.ids_masked[b]], 4)
        slow = slow_regress(*arguments, drop[b].tolist())
        torch.testing.assert_close(got[b].double(), slow, rtol=1e-5, atol=1e-5)


QUIRKS = [
    "values have positions", "residual has positions", "MLP residual is not normalized",
    "queries do not see each other", "no last norm",
]  # fmt: skip


@pytest.mark.parametrize("quirk", QUIRKS)
def test_cae_regressor_has_the_source_s_quirks(small, quirk):
    """Each expectable variant differs by far more than rounding, so the test above tells them apart."""
    torch.manual_seed(1)
    model = model_spec(20, 28, 4)
    regressor = cae.Regressor(model, 24, 4, 2, 0.5)
    cae.initialize(regressor)
    scramble(regressor, 2, 0.3)
    plan = fk.block_masking(make_rng(), torch.arange(1), model.grid, 17, min_block=3)
    visible = torch.randn(1, 18, 24)
    table = position_table(24, model.grid, "row")[1:]
    arguments = (doubles(regressor), visible[0].double(), table[plan.ids_keep[0]], table[plan.ids_masked[0]], 4)
    other = slow_regress(*arguments, [(1.0, 1.0)] * 2, quirk=quirk)
    assert (regressor(visible, plan)[0] - other).abs().max() > 0.01


def test_cae_decoder_sees_the_masked_latents_only(small):
    """It gets (B, M, D) and the places of these; what it says of a patch depends on all of them."""
    method = build(drop_path=0.0)
    latent = torch.randn(2, 12, WIDTH, requires_grad=True)
    ids = torch.stack([torch.randperm(24)[:12] for _ in range(2)])
    out = method.decoder(latent, ids)
    assert out.shape == (2, 12, 48)
    (grad,) = torch.autograd.grad(out[0, 3].sum(), latent)
    assert grad[0].abs().sum(1).min() > 0 and not grad[1].any()
    order = torch.randperm(12)
    torch.testing.assert_close(method.decoder(latent[:, order], ids[:, order]), out[:, order])
