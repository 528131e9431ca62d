"""SimMIM against slow_simmim.py: loss, gradients, masks, bias, side effects, pictures, weights, presets."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from method_checks import assert_no_side_effects, assert_parts_average, assert_repeats, learn, waves
from slow_reference import (
    SMALL,
    assert_same_gradients,
    cut_view,
    doubles,
    draw_flips,
    linear,
    make_batch,
    make_rng,
    model_spec,
    under,
)
from slow_simmim import IDS, SHAPES, build, slow_drops, slow_encode, slow_loss

from fastmim.blocks import random_drop_path
from fastmim.config import SIZES, Size, TrainConfig
from fastmim.export import load_encoder, write_encoder
from fastmim.methods import base, simmim

# ---- the whole method


@pytest.mark.parametrize("norm_pix", [False, True], ids=["plain", "norm_pix"])
@pytest.mark.parametrize(("shape", "cell"), SHAPES, ids=IDS)
def test_simmim_loss_and_gradients_equal_the_slow_recomputation(small, shape, cell, norm_pix):
    method = build(shape, cell, norm_pix=norm_pix)
    batch, rng = make_batch(method), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    drops = [f for image in slow_drops(rng, batch.ids, 0.5, SMALL[1]) for pair in image for f in pair]
    assert {0.0, 1.0, 2.0} == set(drops), "the case must hold branches that are dropped, kept and scaled"
    cells = method.model.num_patches // cell**2
    weights = doubles(method)
    slow = slow_loss(method, weights, batch, rng, cell, math.ceil(0.6 * cells), 0.5, norm_pix)
    output = method(batch, rng)
    assert output.loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert output.parts["pixel"].item() == output.loss.item() and not output.parts["pixel"].requires_grad
    output.loss.backward()
    slow.backward()
    assert all(w.grad is not None for w in weights.values()), "every parameter takes part"
    assert_same_gradients(method, weights)


def test_simmim_relative_bias_moves_attention_and_starts_at_zero(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    before = method(batch, rng).loss.item()
    with torch.no_grad():
        method.encoder.relative_bias.table.zero_()
    assert method(batch, rng).loss.item() != pytest.approx(before, rel=1e-6)
    fresh = simmim.SimMIM(method.model, simmim.Config())
    assert not fresh.encoder.relative_bias.table.any()
    assert fresh.encoder.relative_bias.table.shape == (7 * 11 + 3, SMALL[2])


def test_simmim_masks_30_of_49_cells_at_224():
    with torch.device("meta"):
        method = simmim.SimMIM(model_spec(224, 224, 16, 3, "vit_base"), simmim.Config())
    plan = method.mask(make_rng(), torch.arange(5))
    assert plan.ids_masked.shape == (5, 120) and plan.ids_keep.shape == (5, 76)
    cells = plan.mask.view(5, 7, 2, 7, 2)
    assert torch.equal(cells.amin((2, 4)), cells.amax((2, 4))), "cells of 32 pixels share one fate"


@pytest.mark.parametrize("cells", [1, 4, 9, 16, 49, 64, 256])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75])
def test_simmim_masks_the_ceiling_of_the_ratio(cells, ratio):
    """The source masks ceil(cells x ratio); ours keeps floor(cells x (1 - ratio)): the same, in exact arithmetic."""
    from fractions import Fraction

    from fastmim.config import ConfigError, count_kept

    masked = math.ceil(cells * Fraction(str(ratio)))
    if masked == cells:
        with pytest.raises(ConfigError, match="visible"):
            count_kept(cells, ratio)
    else:
        assert cells - count_kept(cells, ratio) == masked


def test_simmim_encoder_never_sees_masked_pixels_and_scores_them_alone(small):
    method = build(drop_path=0.0)
    batch, rng = make_batch(method), make_rng()
    plan = method.mask(rng, batch.ids)
    flip = torch.tensor(draw_flips(rng, batch.ids))
    is_masked = plan.mask.view(-1, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    is_masked = torch.where(flip.view(-1, 1, 1, 1), is_masked.flip(3), is_masked)
    crop = batch.crops[0]
    noise = torch.randint(0, 256, crop.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokens = method._encode(crop, plan, flip=flip)
    assert torch.equal(method._encode(torch.where(is_masked, noise, crop), plan, flip=flip), tokens)
    spoilt = torch.where(is_masked, crop, noise)
    assert not torch.equal(method._encode(spoilt, plan, flip=flip), tokens)
    torch.nn.init.zeros_(method.head.weight)
    loss = method(batch, rng).loss
    assert torch.equal(method(Batch((spoilt,), batch.ids), rng).loss, loss), "visible pixels are no target"
    assert not torch.equal(method(Batch((torch.where(is_masked, noise, crop),), batch.ids), rng).loss, loss)


def test_simmim_features_are_those_of_the_whole_image(small):
    """No mask token, no stochastic depth: what k-NN and probes read."""
    method = build()
    images = make_batch(method, 3).crops[0]
    m, weights = method.model, under(doubles(method), "encoder")
    features = method.encoder.features(images)
    for image, feature in zip(images, features, strict=True):
        view = cut_view(image, m.image_size, 0, 0, False, m.mean, m.std)
        tokens = slow_encode(weights, view, [], m.patch_size, SMALL[2])
        torch.testing.assert_close(feature.double(), tokens[1:].mean(0), rtol=1e-4, atol=1e-5)


def test_simmim_encoder_can_be_exported_and_read_back(small, tmp_path):
    method = build()
    images = make_batch(method, 2).crops[0]
    write_encoder(method.encoder, "simmim", tmp_path / "encoder.safetensors")
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    assert isinstance(encoder, simmim.MaskedEncoder)
    assert torch.equal(encoder.features(images), method.encoder.features(images))


def test_simmim_without_absolute_position_and_bias_is_blind_to_places(small):
    """All places masked but one: with a zero table, the token's value does not depend on where the visible patch is."""
    method = build(drop_path=0.0)
    with torch.no_grad():
        method.encoder.relative_bias.table.zero_()
    patch = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(0))
    outputs = []
    for place in (0, 17):
        order = torch.tensor([[place] + [i for i in range(24) if i != place]])
        outputs.append(method.encoder(patch, order.argsort(1))[0, 1 + place])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


# ---- stochastic depth, side effects, repetition


def test_factors_of_a_branch_lie_side_by_side():
    """Kernels read them as they are, where they once copied 2 for each block, and 2 more in the backward pass."""
    rng, ids = make_rng(), torch.arange(5)
    drops = random_drop_path(rng, ids, 0.5, 3, 1)
    assert [tuple(d.shape) for d in drops] == [(5, 3, 2), (5, 1, 2)]
    assert all(branch.is_contiguous() for d in drops for i in range(d.shape[1]) for branch in d[:, i].unbind(1))
    torch.testing.assert_close(drops[0], torch.tensor(slow_drops(rng, ids, 0.5, 3)))


def test_simmim_forward_has_no_side_effects_and_repeats_bit_for_bit(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    assert_no_side_effects(method, batch, rng)
    assert_repeats(method, batch, rng)


def test_simmim_micro_batches_average_to_the_full_batch(small):
    method = build()
    assert_parts_average(method, make_batch(method, 6), make_rng(), 2)


def test_simmim_overfits_16_images(monkeypatch):
    """Fixed pictures and masks: the absolute error falls to a quarter of its start, which is that of a prediction of 0."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    method = simmim.SimMIM(model_spec(16, 16, 4, 1), simmim.Config(mask_cell=1, drop_path=0.0))
    first, *_, last = learn(method, Batch((waves(16),), torch.arange(16)), steps=400, peak=1e-2)
    assert last["loss"] < 0.25 * first["loss"]


# ---- pictures


def test_simmim_pictures_show_view_mask_and_prediction(small):
    method = build()
    batch, rng = make_batch(method, 2), make_rng()
    plan = method.mask(rng, batch.ids)
    weights, m = doubles(method), method.model
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    std, mean = (torch.tensor(v, dtype=torch.float64) for v in (m.std, m.mean))
    for i, image in enumerate(batch.crops[0]):
        view = cut_view(image, m.image_size, 0, 0, False, m.mean, m.std)
        masked = plan.mask[i].nonzero()[:, 0].tolist()
        pred = linear(weights, "head", slow_encode(under(weights, "encoder"), view, masked, 4, SMALL[2])[1:])
        plain = cut_view(image, m.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(pictures.view[i].double(), plain, rtol=0, atol=1e-5)
        for p in range(24):
            top, left = p // 6 * 4, p % 6 * 4
            at = (slice(None), slice(top, top + 4), slice(left, left + 4))
            expected = plain[at]
            if p in masked:
                assert (pictures.masked[i][at] == 0.5).all()
                expected = (pred[p].view(4, 4, 3) * std + mean).clamp(0, 1).permute(2, 0, 1)
            torch.testing.assert_close(pictures.output[i][at].double(), expected, rtol=0, atol=1e-4)


# ---- weights, weight decay, presets


def test_simmim_base_has_the_published_parameters():
    with torch.device("meta"):
        method = simmim.SimMIM(model_spec(224, 224, 16, 3, "vit_base"), simmim.Config())
    # Per block: fused qkv without a key bias, projection, MLP, two norms, two layer scales.
    d = 768
    block = 3 * d * d + 2 * d + d * d + d + 8 * d * d + 5 * d + 4 * d + 2 * d
    encoder = 12 * block + d * d + d + 2 * d + 2 * d + (27 * 27 + 3) * 12
    assert sum(p.numel() for p in method.encoder.parameters()) == encoder == 85_666_128
    assert sum(p.numel() for p in method.head.parameters()) == d * d + d


def test_simmim_initial_weights_follow_the_source():
    torch.manual_seed(0)
    method = simmim.SimMIM(model_spec(64, 64, 16, 3, "vit_tiny"), simmim.Config())
    e = method.encoder
    # A normal distribution cut at one deviation has a deviation of .5396 of it.
    for weight in (e.patch_embed.weight, e.blocks[3].attn.qkv.weight, e.blocks[7].fc1.weight):
        assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.5396 * 0.02, rel=0.02)
    for n in (1, 12):
        for weight in (e.blocks[n - 1].attn.proj.weight, e.blocks[n - 1].fc2.weight):
            assert weight.std().item() == pytest.approx(0.5396 * 0.02 / math.sqrt(2 * n), rel=0.02)
    assert e.cls_token.abs().max() <= 0.02 and 0 < e.mask_token.abs().max() <= 0.02
    zero = ["patch_embed.bias", "blocks.0.attn.qkv.q_bias", "blocks.0.attn.proj.bias", "blocks.5.fc1.bias"]
    assert not any(e.state_dict()[name].any() for name in zero)
    assert all((b.gamma_1 == 0.1).all() and (b.gamma_2 == 0.1).all() for b in e.blocks)
    bound = 1 / math.sqrt(192)
    assert 0.95 * bound < method.head.weight.abs().max() <= bound, "the head keeps torch's default"


def test_simmim_spares_vectors_and_the_class_token_from_weight_decay_but_not_mask_token_and_bias_table(small):
    method = build()
    spared = {n for n, p in method.named_parameters() if method.no_decay(n, p)}
    expected = {n for n, p in method.named_parameters() if p.ndim == 1} | {"encoder.cls_token"}
    assert spared == expected and not spared & {"encoder.relative_bias.table", "encoder.mask_token"}


def test_simmim_asks_for_one_crop_and_is_found_by_its_name(small):
    assert base.find("simmim").METHOD is simmim.SimMIM and set(simmim.PRESETS) >= {"demo", "paper"}
    assert build().crops == (CropSpec(size=(16, 24), scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3)),)
    assert build().ema_pairs() == []


def test_simmim_paper_preset_is_the_published_recipe():
    preset = simmim.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(method="simmim"), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=2048, epochs=800.0, betas=(0.9, 0.999),
        weight_decay=0.05, warmup="10ep", clip=5.0, lr=None, schedule="step",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(4e-4) and config.peak_lr * config.warmup_start == pytest.approx(2e-6)
    options = dict(mask_ratio=0.6, mask_cell=2, norm_pix=False, crop_scale=(0.67, 1.0), layer_scale=0.1, drop_path=0.1)
    assert dataclasses.asdict(preset.options) == options


def test_the_guide_quotes_this_method_as_it_is():
    """Every line of code that docs/adding-a-method.md shows from the file is in the file."""
    root = Path(simmim.__file__).parents[2]
    source = {line.strip() for line in Path(simmim.__file__).read_text().splitlines()}
    text = (root / "docs" / "adding-a-method.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    quoted = [block for block in blocks if block.startswith("# fastmim/methods/simmim.py")]
    assert len(quoted) >= 4
    for block in quoted:
        missing = [line for line in block.splitlines()[1:] if line.strip() and line.strip() not in source]
        assert not missing
