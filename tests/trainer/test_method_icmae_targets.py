"""ICMAE's targets, ranks, heads, heat maps; side effects, pictures, export, sizes and presets."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from icmae_case import MODES, NO_COLOR, SHAPES, assert_same_parts, build, make_batch
from method_checks import assert_no_side_effects, assert_repeats
from slow_icmae import KEPT, slow_decode, slow_encode, slow_head, slow_heat, slow_parts
from slow_reference import cut_view, doubles, draw_visible, make_rng, model_spec, patch_rows, scramble, under
from torch import nn
from torch.nn import functional as F

from fastmim.config import ConfigError, TrainConfig
from fastmim.engine.base import EngineSpec
from fastmim.engine.single import SingleEngine
from fastmim.heads import NormalizedHead
from fastmim.methods import base, icmae
from fastmim.vit import Encoder

# ---- targets


def reached(method) -> set[str]:
    method(make_batch(method), make_rng()).loss.backward()
    return {n.split(".")[0] for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}


def test_icmae_gradients_reach_what_they_should(small):
    tasks = {"encoder", "decoder", "position_head"}
    assert reached(build(contrast="none")) == tasks
    assert reached(build()) == tasks | {"projector", "predictor"}
    assert reached(build(contrast="sd_dec")) == tasks | {"class_blocks", "projector", "predictor"}
    assert reached(build(position="none", contrast="none")) == {"encoder", "decoder"}
    assert reached(build(pos_drop=0.5)) == tasks | {"projector", "predictor", "position_drop"}
    assert reached(build(second_view="key")) == tasks | {"projector", "predictor"}


@pytest.mark.parametrize("contrast", ["enc_cls", "sd_dec"])
def test_icmae_no_gradient_reaches_the_keys_even_when_asked_for(small, contrast):
    """The keys are constants of the loss, whatever their parameters' flags say."""
    method = build(contrast=contrast)
    for parameter in method.parameters():
        parameter.requires_grad_(True)
    method(make_batch(method), make_rng()).loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target_"), name


def test_icmae_keys_send_no_gradient_into_the_decoder(small):
    """sd_dec: without queries, the decoder learns from the pixels alone."""
    grads = []
    for weight in (0.0, 0.1):
        method = build(contrast="sd_dec", contrast_weight=weight)
        method.projector.requires_grad_(False)
        with torch.no_grad():
            method.predictor[0].weight.zero_()  # constant queries: their gradient stops here
        method(make_batch(method), make_rng()).loss.backward()
        grads.append(method.decoder.pred.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options, momenta",
    [
        (dict(), [1 - 0.01 * 0.5 * (1 + math.cos(math.pi * n / 3)) for n in range(3)]),
        (dict(momentum=(0.9, 0.9)), [0.9] * 3),
        (dict(contrast="sd_dec"), [0.999] * 3),
        (dict(freeze_patch_embed=True, momentum=(0.5, 1.0)), [1 - 0.25 * (1 + math.cos(math.pi * n / 3)) for n in range(3)]),
    ],
    ids=["cosine", "constant", "sd_dec", "frozen"],
)  # fmt: skip
def test_icmae_target_is_the_closed_form_after_three_steps(small, options, momenta):
    """t3 = m1 m2 m3 t0 + sum of (1 - m_i) x the later m's x the weights after step i."""
    method = build(**options)
    engine = SingleEngine(method, EngineSpec(
        device=torch.device("cpu"), precision="fp32", accumulate=1, micro_batch=5, lr=1e-2, weight_decay=0.05,
        betas=(0.9, 0.95), clip=None, zero_stage=0))  # fmt: skip
    targets = {n: p.detach().double() for n, p in method.named_parameters() if n.startswith("target_")}
    assert len(targets) > 5
    for step, momentum in enumerate(momenta):
        assert method.momentum(step / 3) == pytest.approx(momentum, abs=1e-12)
        engine.backward(engine.forward(make_batch(method, seed=step), make_rng(step=step)).loss)
        engine.step(method.ema_pairs(), method.momentum(step / 3))
        online = dict(method.named_parameters())
        for name in targets:
            if online[name.removeprefix("target_")].requires_grad:
                targets[name] = (
                    momentum * targets[name] + (1 - momentum) * online[name.removeprefix("target_")].double()
                )
    for name, target in targets.items():
        torch.testing.assert_close(method.get_parameter(name).double(), target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("contrast, names", [("enc_cls", ("encoder",)), ("sd_dec", ("class_blocks",)), ("none", ())])
def test_icmae_targets_start_as_copies_and_stay_frozen(small, contrast, names):
    method = build(scrambled=False, contrast=contrast)
    parameters = dict(method.named_parameters())
    targets = [n for n in parameters if n.startswith("target_")]
    assert {n.split(".")[0] for n in targets} == ({f"target_{n}" for n in (*names, "projector")} if names else set())
    pairs = {id(pair.target): pair.online for pair in method.ema_pairs()}
    for name in targets:
        online = parameters[name.removeprefix("target_")]
        assert torch.equal(parameters[name], online) and parameters[name] is not online
        assert not parameters[name].requires_grad and pairs[id(parameters[name])] is online
    assert len(pairs) == len(targets)


def test_icmae_frozen_patch_embedding_is_left_alone(small):
    method = build(freeze_patch_embed=True)
    before = method.encoder.patch_embed.weight.clone()
    engine = SingleEngine(method, EngineSpec(torch.device("cpu"), "fp32", 1, 5, 1e-2, 0.5, (0.9, 0.95), None, 0))
    engine.backward(engine.forward(make_batch(method), make_rng()).loss)
    engine.step()
    assert torch.equal(method.encoder.patch_embed.weight, before), "neither gradient nor weight decay"
    trained = {id(p) for p in engine.parameters}
    assert not trained & {id(p) for p in method.encoder.patch_embed.parameters()}
    assert not any(pair.online is method.encoder.patch_embed.weight for pair in method.ema_pairs())


# ---- several ranks


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_icmae_positives_are_offset_by_rank_and_negatives_are_everybody_s(small, monkeypatch, rank):
    """Rank r of 3 with 4 images each: 12 keys, label i + 4 r."""
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method, 4), make_rng()
    strangers = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(7)), dim=1)
    monkeypatch.setattr(icmae.dist, "rank", lambda: rank)
    monkeypatch.setattr(
        icmae.dist, "gather_rows", lambda k: torch.cat([strangers[: 4 * rank], k.detach(), strangers[4 * rank :]])
    )
    slow = slow_parts(
        method, doubles(method), batch, rng, strangers=list(strangers.double()), label_offset=4 * rank
    )  # fmt: skip
    assert_same_parts(method(batch, rng), slow)


def test_icmae_sd_dec_compares_the_images_of_one_rank(small, monkeypatch):
    method = build(contrast="sd_dec")
    batch, rng = make_batch(method), make_rng()
    alone = method(batch, rng).parts["contrast"]
    monkeypatch.setattr(icmae.dist, "rank", lambda: 1)
    monkeypatch.setattr(icmae.dist, "gather_rows", lambda k: pytest.fail("gathered"))
    assert torch.equal(method(batch, rng).parts["contrast"], alone)


# ---- heads


@pytest.mark.parametrize("widths", [(12, 20, 5), (12, 20, 20, 12)], ids=str)
def test_normalized_head_equals_torch_s_layers(widths):
    """Linear without bias, BatchNorm1d in training; the last one without affine parameters. MoCo v3's _build_mlp."""
    torch.manual_seed(0)
    ours = NormalizedHead(*widths)
    scramble(ours)
    theirs = nn.Sequential()
    for i, (a, b) in enumerate(pairwise(widths)):
        is_last = i == len(widths) - 2
        theirs += nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not is_last))
        theirs += nn.Sequential() if is_last else nn.Sequential(nn.ReLU())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(9, 12)
    torch.testing.assert_close(ours(x), theirs.train()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x).double(), slow_head(doubles(ours), x.double()), rtol=1e-4, atol=1e-5)


# ---- heat maps


@pytest.mark.parametrize("heat", ["attn", "feat", "sim"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_icmae_heat_map_is_the_chosen_one_of_the_last_block(small, shape, heat):
    method = build(shape, heat=heat)
    images = make_batch(method, 3).crops[0]
    with torch.no_grad():
        heat = method.heat_map(images)
        with torch.autocast("cpu", torch.bfloat16):
            low = method.heat_map(images)
    assert heat.shape == (3, *method.model.grid) and low.dtype == torch.float32
    for ours, lower, image in zip(heat, low, images):
        slow = slow_heat(method, image)
        torch.testing.assert_close(ours.double(), slow.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(lower.double(), slow.detach(), rtol=5e-2, atol=1e-2 if heat == "sim" else 1e-4)
    assert not method.encoder.norm._forward_hooks, "what was looked at leaves nothing behind"


def test_methods_with_box_updates_must_have_heat_maps(small):
    with pytest.raises(TypeError, match="heat_map: expected the method to define it"):
        base.Method(model_spec()).heat_map(torch.zeros(1, 3, 16, 24, dtype=torch.uint8))


# ---- side effects, repetition, pictures, export


@pytest.mark.parametrize("mode", ["default", "sd_dec", "pos_drop"])
def test_icmae_forward_has_no_side_effects_and_repeats(small, mode):
    method = build(**MODES[mode])
    batch, rng = make_batch(method), make_rng()
    assert_no_side_effects(method, batch, rng)
    assert_repeats(method, batch, rng)


@pytest.mark.parametrize("mode", ["default", "sd_dec", "pos_drop"])
def test_icmae_pictures_show_the_whole_image_and_the_decoder_s_output(small, mode):
    method = build(**MODES[mode])
    images, ids, rng = make_batch(method).crops[0], torch.arange(5), make_rng()
    m, weights = method.model, doubles(method)
    with torch.no_grad():
        pictures = method.reconstruct(images, ids, rng)
    for i, visible in enumerate(draw_visible(rng, ids, 24, KEPT)):
        exact = cut_view(images[i], m.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(pictures.view[i].double(), exact, rtol=0, atol=1e-5)
        view = cut_view(images[i], m.image_size, 0, 0, False, m.mean, m.std)
        latent = slow_encode(under(weights, "encoder"), view, visible, m.patch_size)
        pred = slow_decode(under(weights, "decoder"), latent, visible, m.grid)[1:].detach()
        colors = torch.tensor(m.std * 16).double(), torch.tensor(m.mean * 16).double()
        drawn = patch_rows(pictures.output[i], m.patch_size).double()
        for patch in range(24):
            expected = patch_rows(exact, 4)[patch] if patch in visible else pred[patch] * colors[0] + colors[1]
            torch.testing.assert_close(drawn[patch], expected.clamp(0, 1), rtol=0, atol=1e-4)


def test_icmae_export_loads_into_the_plain_encoder(small):
    method = build()
    plain = Encoder(method.model)
    plain.load_state_dict(method.export())
    patches = torch.randn(2, 24, 48)
    torch.testing.assert_close(plain(patches), method.encoder(patches))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(contrast="sd_dec", shape=SHAPES[1]), "sd_dec: expected patches of as many values .* 48, got 20"),
        (dict(contrast="sd_dec", second_view="key"), "second-view key: expected --icmae.contrast enc_cls or none"),
        (dict(mask_share="complement", mask_ratio=0.4), "at most half of the 24 patches to be visible, got 14"),
        (dict(pos_drop=1.5), "pos-drop: expected a number in 0 .. 1, got 1.5"),
        (dict(pos_drop=0.5, position="none"), "pos-drop: expected 0 where no position is predicted, got 0.5"),
        (dict(box_updates=(0.2, 1.0)), "box-updates: expected shares between 0 and 1"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_icmae_contradictions_are_one_clear_line(small, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(**({"shape": SHAPES[0]} | options))
    assert "\n" not in str(error.value) and str(error.value).startswith("--icmae.")


def test_icmae_counts_as_mixing_images_only_with_contrast(small):
    assert build().mixes_images and build(contrast="sd_dec").mixes_images
    assert not build(contrast="none").mixes_images


# ---- sizes and presets


def test_icmae_base_has_the_expected_numbers_of_parameters():
    def millions(*prefixes: str, **options) -> float:
        with torch.device("meta"):
            method = icmae.ICMAE(model_spec(224, 224, 16, 3, "vit_base"), icmae.Config(**options))
        return sum(p.numel() for n, p in method.named_parameters() if n.split(".")[0] in prefixes) / 1e6

    assert round(millions("encoder"), 1) == 85.6
    assert round(millions("decoder"), 2) == 0.40
    assert round(millions("position_head"), 2) == 0.37
    assert round(millions("class_blocks", "projector", contrast="sd_dec"), 1) == 37.3
    assert round(millions("predictor", contrast="sd_dec"), 1) == 6.3
    assert round(millions("target_class_blocks", "target_projector", contrast="sd_dec"), 1) == 37.3
    assert round(millions("target_encoder"), 1) == 85.6


def test_icmae_heads_have_the_published_shapes():
    def shapes(name: str, **options) -> list[tuple]:
        with torch.device("meta"):
            method = icmae.ICMAE(model_spec(224, 224, 16, 3, "vit_base"), icmae.Config(**options))
        return [(part.in_features, part.out_features) for part in getattr(method, name) if isinstance(part, nn.Linear)]

    assert shapes("position_head") == [(768, 384), (384, 196)]
    assert shapes("projector") == [(768, 4096), (4096, 256)]
    assert shapes("predictor") == [(256, 4096), (4096, 256)]
    assert shapes("projector", contrast="sd_dec") == [(768, 4096), (4096, 4096), (4096, 768)]
    assert shapes("predictor", contrast="sd_dec") == [(768, 4096), (4096, 768)]


def test_icmae_paper_preset_is_the_recipe_for_tiny_imagenet():
    preset = icmae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=64, epochs=300.0, betas=(0.9, 0.95),
        weight_decay=0.05, warmup="40ep", warmup_start=0.0, clip=None, base_lr=1e-3, lr=None,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(2.5e-4)
    assert preset.options == icmae.Config()
    defaults = dict(
        mask_ratio=0.75, mask_share="same", decoder_width=128, decoder_depth=1, decoder_heads=16, norm_pix=False,
        position="ce", pos_drop=0.0, contrast="enc_cls", contrast_weight=0.1, freeze_patch_embed=False, crop_alpha=0.1,
        crop_scale=(0.2, 1.0), box_updates=(0.2, 0.4, 0.6, 0.8), crop="contrastive", first_crop="sim_center", heat="attn",
        second_view="full",
    )  # fmt: skip
    assert {name: getattr(preset.options, name) for name in defaults} == defaults
    color = dict(
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_probability=0.8, grey_probability=0.2,
        blur_probability=0.0, blur_sigma=(0.1, 2.0),
    )  # fmt: skip
    assert dataclasses.asdict(preset.options.color) == color


def test_icmae_is_found_by_its_name():
    assert base.find("icmae").METHOD is icmae.ICMAE and set(icmae.PRESETS) >= {"demo", "paper"}
