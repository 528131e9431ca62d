"""CMAE's branches, two processes, side effects, sizes and presets."""

import dataclasses
import math

import pytest
import torch
from cmae_case import NO_COLOR, SIZES_OF_CASE, SMALL_OPTIONS, TAU, build
from fastmim_pipelines.spec import Batch
from method_checks import assert_no_side_effects
from slow_reference import (
    cmae_vectors,
    cut_view,
    doubles,
    draw_flips,
    draw_shifts,
    encode,
    info_nce,
    make_batch,
    make_rng,
    model_spec,
    position_table,
    small_cmae,
    two_rank_results,
    under,
)

from fastmim.config import TrainConfig
from fastmim.methods import base, cmae

# ---- branches


def test_cmae_feature_is_the_mean_over_visible_and_masked_patches(small):
    """The feature decoder has its own weights and mask token; masked patches take part in its output."""
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method), make_rng()
    before = method(batch, rng).parts
    with torch.no_grad():
        # Not a constant: layer norm would remove it.
        method.feature_decoder.mask_token.copy_(torch.randn(32))
    after = method(batch, rng).parts
    assert torch.equal(before["pixel"], after["pixel"])
    assert abs(before["contrast"] - after["contrast"]) > 1e-3 * before["contrast"]


@pytest.mark.parametrize("name, width", [("vit_base", 768), ("vit_large", 1024)])
def test_cmae_feature_decoder_ends_in_the_encoder_s_width(name, width):
    """Projector and target projector take the same width, for ViT-L too."""
    with torch.device("meta"):
        method = cmae.CMAE(model_spec(224, 224, 16, 3, name), cmae.Config())
    assert method.feature_decoder.pred.weight.shape == (width, 512)
    assert method.pixel_decoder.pred.weight.shape == (768, 512)
    assert method.projector[0].in_features == method.target_projector[0].in_features == width
    assert method.predictor[0].in_features == 256
    assert (len(method.pixel_decoder.blocks), len(method.feature_decoder.blocks)) == (8, 2)
    assert {b.attn.heads for d in (method.pixel_decoder, method.feature_decoder) for b in d.blocks} == {16}


def test_cmae_target_features_have_no_final_norm_and_no_class_token(small):
    method = build(color=NO_COLOR)
    assert "target_encoder.norm.weight" not in dict(method.named_parameters())
    batch, rng = make_batch(method), make_rng()
    m = method.model
    target = method._target(batch, rng, dict(size=m.image_size, flip=torch.tensor(draw_flips(rng, batch.ids))))
    weights = doubles(method)
    means = []
    for crop, flip, shift in zip(batch.crops[0], draw_flips(rng, batch.ids), draw_shifts(rng, batch.ids, 7)):
        view = cut_view(crop, m.image_size, *shift, flip, m.mean, m.std)
        tokens = encode(
            under(weights, "target_encoder"), view, list(range(24)), patch=4, heads=3, first="row", final_norm=False
        )
        means.append(tokens[1:].mean(0))
    torch.testing.assert_close(target.double(), torch.stack(means), rtol=1e-5, atol=1e-5)


def test_cmae_positions_put_the_row_first_everywhere(small):
    method = build()
    tables = {n: b for n, b in method.named_buffers() if n.endswith("position")}
    assert set(tables) == {f"{n}.position" for n in ("encoder", "target_encoder", "pixel_decoder", "feature_decoder")}
    for table in tables.values():
        expected = position_table(table.shape[1], (4, 6), "row")
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-7)


def test_cmae_target_equals_online_at_step_0(small):
    """A fresh method; and equal features, since with a unit norm left out the two encoders compute the same."""
    torch.manual_seed(0)
    method = cmae.CMAE(model_spec(), cmae.Config(**SMALL_OPTIONS))
    online = dict(method.named_parameters())
    targets = {n: p for n, p in online.items() if n.startswith("target_")}
    assert len(targets) > 10
    for name, parameter in targets.items():
        assert torch.equal(parameter, online[name.removeprefix("target_")]), name
        assert parameter.data_ptr() != online[name.removeprefix("target_")].data_ptr()
        assert not parameter.requires_grad
    assert not torch.equal(method.projector[3].weight, method.predictor[3].weight[:, :40])
    patches = torch.randn(2, 24, 48)
    tokens = method.target_encoder(patches)
    torch.testing.assert_close(method.encoder.norm(tokens)[0], method.encoder(patches))


def test_cmae_gradients_of_each_term_reach_what_they_should(small):
    """Contrast: everything online but the pixel decoder; pixels: encoder and pixel decoder; the target: nothing."""
    reached = {}
    for term, options in (("contrast", dict(pixel_weight=0.0)), ("pixel", dict(contrast_weight=0.0))):
        method = build(**options)
        method(make_batch(method), make_rng()).loss.backward()
        grads = [(n, p.grad) for n, p in method.named_parameters()]
        reached[term] = {n.split(".")[0] for n, grad in grads if grad is not None and grad.any()}
    assert reached["contrast"] == {"encoder", "feature_decoder", "projector", "predictor"}
    assert reached["pixel"] == {"encoder", "pixel_decoder"}


def test_cmae_no_gradient_reaches_the_target_even_when_asked_for(small):
    """The keys are constants of the loss, whatever their parameters' flags say."""
    method = build()
    for parameter in method.parameters():
        parameter.requires_grad_(True)
    method(make_batch(method), make_rng()).loss.backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is None) == name.startswith("target_"), name


def test_cmae_measures_are_cosines(small):
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method), make_rng()
    measures = method(batch, rng).measures
    _, q, k = cmae_vectors(method, doubles(method), batch, rng, **SIZES_OF_CASE)
    cosines = (q / q.norm(dim=1, keepdim=True)) @ (k / k.norm(dim=1, keepdim=True)).T
    assert measures["cosine/positive"].item() == pytest.approx(cosines.diag().mean().item(), abs=1e-5)
    assert measures["cosine/mean"].item() == pytest.approx(cosines.mean().item(), abs=1e-5)


# ---- several ranks


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_cmae_positives_are_offset_by_rank_and_negatives_are_everybody_s(small, monkeypatch, rank):
    """Rank r of 3 with 4 images each: 12 keys, label i + 4 r."""
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method), make_rng()
    torch.manual_seed(7)
    strangers = torch.nn.functional.normalize(torch.randn(8, 16), dim=1)
    monkeypatch.setattr(cmae.dist, "rank", lambda: rank)
    monkeypatch.setattr(
        cmae.dist, "gather_rows", lambda k: torch.cat([strangers[: 4 * rank], k.detach(), strangers[4 * rank :]])
    )
    _, queries, keys = cmae_vectors(method, doubles(method), batch, rng, **SIZES_OF_CASE)
    everybody = torch.cat([strangers[: 4 * rank].double(), keys, strangers[4 * rank :].double()])
    slow = 2 * TAU * info_nce(queries, everybody, [4 * rank + i for i in range(4)], TAU)
    assert method(batch, rng).parts["contrast"].item() == pytest.approx(slow.item(), rel=1e-5)


def test_cmae_over_two_processes_equals_the_full_batch(small):
    """gloo, 4 images each: mean of the losses and mean of the gradients (what DDP averages) against 8 images in one."""
    ranks = two_rank_results()
    method = small_cmae()
    output = method(make_batch(method, 8), make_rng())
    output.loss.backward()
    for name, value in output.parts.items():
        both = sum(r[f"part.{name}"].item() for r in ranks) / 2
        assert both == pytest.approx(value.item(), rel=1e-5), name
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    assert {f"grad.{n}" for n in gradients} == {n for n in ranks[0] if n.startswith("grad.")}
    floor = 1e-6 * max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        both = (ranks[0][f"grad.{name}"] + ranks[1][f"grad.{name}"]) / 2
        assert (both - gradient).norm() <= 1e-4 * gradient.norm() + floor, name


def test_cmae_over_two_processes_uses_different_negatives_than_alone(small):
    """The case can tell a gathered loss from a local one."""
    method = small_cmae()
    whole = make_batch(method, 8)
    alone = method(Batch((whole.crops[0][:4],), whole.ids[:4]), make_rng()).parts["contrast"].item()
    assert abs(alone - two_rank_results()[0]["part.contrast"].item()) > 0.01 * alone


# ---- side effects, repetition, precision


def test_cmae_forward_has_no_side_effects(small):
    method = build()
    assert_no_side_effects(method, make_batch(method), make_rng())


def test_cmae_contrast_is_computed_in_float32_under_autocast(small, monkeypatch):
    """Heads may run in bf16; unit vectors and logits may not (cosines / .07 reach 14.3, where bf16 is .06 apart)."""
    given = []
    real = cmae.contrastive_loss
    monkeypatch.setattr(cmae, "contrastive_loss", lambda q, k, **kw: given.append((q, k)) or real(q, k, **kw))
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = method(make_batch(method), make_rng())
    ((q, k),) = given
    assert q.dtype == k.dtype == torch.float32
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    slow = 2 * TAU * info_nce(q.detach().double(), k.double(), [0, 1, 2, 3], TAU)
    assert output.parts["contrast"].item() == pytest.approx(slow.item(), rel=1e-5)
    assert output.loss.dtype == torch.float32


def test_cmae_pictures_show_the_whole_image(small):
    method = build()
    batch, rng = make_batch(method, 5), make_rng()
    height, width = method.model.image_size
    images = batch.crops[0][:, :, :height, :width]
    pictures = method.reconstruct(images, batch.ids, rng)
    for picture, image in zip(pictures.view, images):
        exact = cut_view(image, method.model.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(picture.double(), exact, rtol=0, atol=1e-5)


# ---- sizes and presets


def test_cmae_base_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        method = cmae.CMAE(model_spec(224, 224, 16, 3, "vit_base"), cmae.Config())

    def millions(*prefixes: str) -> float:
        return sum(p.numel() for n, p in method.named_parameters() if n.split(".")[0] in prefixes) / 1e6

    assert round(millions("encoder"), 2) == 85.65
    assert round(millions("pixel_decoder"), 1) == 26.0
    assert round(millions("feature_decoder"), 1) == 7.1
    assert round(millions("projector"), 2) == 1.58
    assert round(millions("predictor"), 2) == 0.79
    assert round(millions("target_encoder", "target_projector"), 1) == 87.2
    assert round(sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6, 1) == 121.1


def test_cmae_fresh_weights_are_initialized_like_mae_s_and_the_heads_like_torch_s(small):
    torch.manual_seed(0)
    method = cmae.CMAE(model_spec(), cmae.Config(decoder_width=64, decoder_heads=4, head_hidden=400, head_out=50))
    for name in ("encoder", "pixel_decoder", "feature_decoder"):
        for part_name, part in getattr(method, name).named_modules():
            if isinstance(part, torch.nn.Linear):
                bound = math.sqrt(6 / (part.in_features + part.out_features))
                assert 0.98 * bound < part.weight.abs().max() <= bound * (1 + 1e-6)
                assert part_name == "patch_embed" or not part.bias.any()
            elif isinstance(part, torch.nn.LayerNorm):
                assert (part.weight == 1).all() and not part.bias.any()
    tokens = torch.cat([p.flatten() for n, p in method.named_parameters() if n.endswith("_token")])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.2)
    for name in ("projector", "predictor"):
        first, norm, _, last = getattr(method, name)
        for layer in (first, last):
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert first.bias.any() and last.bias is None
        assert (norm.weight == 1).all() and not norm.bias.any()


def test_cmae_export_is_the_online_encoder(small):
    method = build()
    assert set(method.export()) == {n for n, _ in method.encoder.named_parameters()}
    assert all(torch.equal(t, method.encoder.get_parameter(n)) for n, t in method.export().items())


def test_cmae_is_found_by_its_name():
    assert base.find("cmae").METHOD is cmae.CMAE and set(cmae.PRESETS) >= {"demo", "paper"}


def test_cmae_paper_preset_is_the_published_recipe():
    preset = cmae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=4096, epochs=300.0, betas=(0.9, 0.95),
        weight_decay=0.05, warmup="40ep", warmup_start=1e-4, clip=None, base_lr=1.5e-4, lr=None,
        lr_end=0.0, schedule="cosine",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(2.4e-3, rel=1e-12)
    color = dict(
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_probability=0.8, grey_probability=0.2,
        blur_probability=0.5, blur_sigma=(0.1, 2.0),
    )  # fmt: skip
    options = dict(
        mask_ratio=0.65, mask_cell=2, crop_scale=(0.2, 1.0), shift=None, pixel_decoder_depth=8, feature_decoder_depth=2,
        decoder_width=512, decoder_heads=16, head_hidden=1536, head_out=256, temperature=0.07, contrast_weight=1.0,
        pixel_weight=1.0, momentum=0.996, color=color,
    )  # fmt: skip
    assert dataclasses.asdict(preset.options) == options
