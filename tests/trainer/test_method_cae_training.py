"""CAE in training: side effects, micro-batches, pictures, sizes, initial weights, weight decay, presets."""

import dataclasses
import math

import pytest
import torch
from fastmim_pipelines.spec import Batch
from method_checks import assert_no_side_effects, assert_parts_average, assert_repeats, learn, waves
from slow_cae import WIDTH, Brightness, build, make_batch
from slow_reference import cut_view, make_rng, model_spec, patch_rows, position_table
from torch import nn

from fastmim.config import SIZES, Size, TrainConfig
from fastmim.methods import base, cae
from fastmim.optim import adamw
from fastmim.tokenizer import DalleEncoder

# ---- side effects, repetition, micro-batches


def test_cae_forward_has_no_side_effects(small):
    method = build(tokenizer=DalleEncoder(3, 8, 1, 30))
    assert_no_side_effects(method, make_batch(method), make_rng())


def test_cae_repeats_bit_for_bit_and_changes_with_step_seed_and_ids(small):
    method = build()
    assert_repeats(method, make_batch(method), make_rng())


def test_cae_micro_batches_average_to_the_full_batch(small):
    method = build(tokenizer=Brightness())
    assert_parts_average(method, make_batch(method, 6), make_rng(), 2)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_parameters_are_used_inside_their_modules_only(small, target):
    """As under ZeRO-3: a parameter holds its values only while the forward of the module that owns it runs."""
    method = build(tokenizer=Brightness() if target == "tokens" else None, decoder_width=36)
    batch, rng = make_batch(method), make_rng()
    with torch.no_grad():
        expected = method(batch, rng).loss
        values = {p: p.data for p in method.parameters()}

        def gather(module, *_):
            for p in module.parameters(recurse=False):
                p.data = values[p]

        def release(module, *_):
            for p in module.parameters(recurse=False):
                p.data = torch.empty(0)

        for module in method.modules():
            if module is not method:
                module.register_forward_pre_hook(gather)
                module.register_forward_hook(release)
            release(module)
        assert torch.equal(method(batch, rng).loss, expected)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_learns_fixed_pictures(monkeypatch, target):
    """Waves of fixed masks: alignment and decoding both get better."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    config = cae.Config(regressor_depth=2, decoder_depth=1, drop_path=0.0)
    method = cae.CAE(model_spec(16, 16, 4, 1), config, Brightness(8) if target == "tokens" else None)
    pictures = waves(16)
    first, *_, last = learn(method, Batch((pictures, pictures[:, :, :12, :12]), torch.arange(16)), steps=120, peak=3e-3)
    assert last["align"] < 0.3 * first["align"]
    decoded = "pixel" if target == "pixel" else "token"
    assert last[decoded] < 0.5 * first[decoded]
    if target == "tokens":
        assert last["mlm_acc"] > 0.6 > 0.4 > first["mlm_acc"]


# ---- pictures


def test_cae_pictures_show_view_mask_and_prediction(small):
    method = build()
    batch, rng = make_batch(method, 2), make_rng()
    plan = method.mask(rng, batch.ids)
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    m = method.model
    predicted = method.decoder(method._predict(batch.crops[0], plan), plan.ids_masked).detach()
    for i in range(2):
        view = cut_view(batch.crops[0][i], m.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        rows = patch_rows(cut_view(batch.crops[0][i], m.image_size, 0, 0, False, m.mean, m.std), 4)
        torch.testing.assert_close(pictures.view[i].double(), view, rtol=0, atol=1e-5)
        masked = plan.ids_masked[i].tolist()
        for patch_id in range(24):
            top, left = patch_id // 6 * 4, patch_id % 6 * 4
            at = (i, slice(None), slice(top, top + 4), slice(left, left + 4))
            if patch_id not in masked:
                for picture in (pictures.masked, pictures.output):
                    torch.testing.assert_close(picture[at].double(), view[at[1:]], rtol=0, atol=1e-5)
                continue
            assert (pictures.masked[at] == 0.5).all()
            values = predicted[i, masked.index(patch_id)].double()
            values = values * math.sqrt(rows[patch_id].var() + 1e-6) + rows[patch_id].mean()
            for place in range(16):
                for c in range(3):
                    expected = min(max(float(values[place * 3 + c] * m.std[c] + m.mean[c]), 0), 1)
                    got = pictures.output[i, c, top + place // 4, left + place % 4].item()
                    assert got == pytest.approx(expected, abs=1e-5)


def test_cae_has_no_pictures_of_tokens(small):
    method = build(tokenizer=Brightness())
    assert method.reconstruct(make_batch(method).crops[0], torch.arange(4), make_rng()) is None


# ---- sizes, initial weights, weight decay, presets


def meta(name="vit_base", **options):
    tokenizer = Brightness(8192)
    with torch.device("meta"):
        return cae.CAE(model_spec(224, 224, 16, 3, name), cae.Config(**options), tokenizer)


def test_cae_base_has_the_published_numbers_of_parameters():
    method = meta()
    sizes = {n: sum(p.numel() for p in part.parameters()) / 1e6 for n, part in method.named_children()}
    assert round(sizes["encoder"], 2) == 85.66
    assert round(sizes["regressor"], 2) == 28.37
    # Four blocks like the encoder's of 7.086 M, a norm, a head of 768 x 8192 + 8192.
    assert round(sizes["decoder"], 2) == 34.66
    assert sizes["bridge"] == 0
    assert round(sum(sizes.values()), 1) == 148.7
    assert {b.attn.heads for part in (method.encoder, method.regressor, method.decoder) for b in part.blocks} == {12}
    assert (len(method.encoder.blocks), len(method.regressor.blocks), len(method.decoder.blocks)) == (12, 4, 4)


@pytest.mark.parametrize("name, width, heads", [("vit_base", 768, 12), ("vit_large", 1024, 16)])
def test_cae_decoder_follows_the_encoder_s_width(name, width, heads):
    method = meta(name)
    assert method.decoder.head.in_features == width and isinstance(method.bridge, nn.Identity)
    assert {b.attn.heads for b in [*method.regressor.blocks, *method.decoder.blocks]} == {heads}


def test_cae_keys_have_no_bias(small):
    method = build()
    names = {n for n, _ in method.named_parameters()}
    assert {
        "encoder.blocks.0.attn.qkv.q_bias",
        "decoder.blocks.0.attn.qkv.v_bias",
        "regressor.blocks.0.attn.q.bias",
    } <= names
    assert not names & {"encoder.blocks.0.attn.qkv.bias", "regressor.blocks.0.attn.k.bias"}


def test_cae_positions_put_the_row_first(small):
    method = build()
    tables = {n: b for n, b in method.named_buffers() if n.endswith("position")}
    assert set(tables) == {"encoder.position", "regressor.position", "decoder.position"}
    for name, table in tables.items():
        expected = position_table(WIDTH, (4, 6), "row")
        torch.testing.assert_close(table.double(), expected[len(expected) - len(table) :], rtol=0, atol=1e-7)
        assert len(table) == (25 if name.startswith("encoder") else 24)


def fresh(monkeypatch, **options):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(96, 3, 3))
    torch.manual_seed(0)
    config = cae.Config(decoder_width=64, decoder_heads=4, regressor_depth=2, decoder_depth=2, **options)
    return cae.CAE(model_spec(), config, Brightness(50))


def check_constants(method, layer_scale):
    for name, p in method.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "gamma" in name:
            assert (p == layer_scale).all(), name
        elif "norm" in name or name == "bridge.1.weight":
            assert (p == 1).all(), name
    tokens = torch.cat([method.encoder.cls_token.flatten(), method.regressor.mask_token.flatten()])
    for values in (tokens, method.encoder.patch_embed.weight):
        assert values.abs().max() <= 0.02, "cut at one deviation"
        # Of a normal cut at one deviation: 0.54 deviations.
        assert values.std().item() == pytest.approx(0.54 * 0.02, rel=0.15)


def test_cae_fresh_weights_are_xavier_s_but_for_the_patch_embedding(monkeypatch):
    method = fresh(monkeypatch)
    check_constants(method, 0.1)
    linears = [(n, p) for n, p in method.named_modules() if isinstance(p, nn.Linear) and n != "encoder.patch_embed"]
    assert len(linears) == 4 * 3 + 1 + 6 * 2 + 4 * 2 + 1
    for name, part in linears:
        bound = math.sqrt(6 / (part.in_features + part.out_features))
        assert 0.97 * bound < part.weight.abs().max() <= bound * (1 + 1e-6), name


def test_cae_beit_init_shrinks_the_last_layer_of_each_branch(monkeypatch):
    method = fresh(monkeypatch, init="beit", layer_scale=1e-5)
    with torch.no_grad():
        method.bridge[0].bias.zero_()  # torch's own, as in the source
    check_constants(method, 1e-5)
    for network in (method.encoder, method.regressor, method.decoder):
        for n, block in enumerate(network.blocks, start=1):
            for part in (block.attn.proj, block.fc2):
                largest = 0.02 / math.sqrt(2 * n)
                assert 0.98 * largest < part.weight.abs().max() <= largest * (1 + 1e-6)
            assert 0.0198 < block.fc1.weight.abs().max() <= 0.02
    assert 0.0198 < method.decoder.head.weight.abs().max() <= 0.02


@pytest.mark.parametrize(
    "name, scale, is_xavier",
    [("vit_base", 0.1, True), *((name, 1e-5, False) for name in ("vit_large", "vit_huge", "vit_giant"))],
)
def test_cae_large_models_start_as_meant(monkeypatch, name, scale, is_xavier):
    monkeypatch.setitem(SIZES, name, Size(32, 2, 2))
    method = cae.CAE(model_spec(name=name), cae.Config())
    assert torch.equal(method.encoder.blocks[0].gamma_1, torch.full((32,), scale))
    assert (method.encoder.blocks[0].fc1.weight.abs().max() > 0.05) == is_xavier


def test_cae_without_layer_scale_has_no_factors(small):
    method = build(layer_scale=0.0)
    assert not any("gamma" in n for n, _ in method.named_parameters())
    assert method(make_batch(method), make_rng()).loss.isfinite()


def test_cae_decays_its_tokens_and_spares_vectors(small):
    method = build()
    decayed, spared = adamw(method, method.no_decay, lr=1.0, weight_decay=0.05, betas=(0.9, 0.999)).param_groups
    names = {p: n for n, p in method.named_parameters()}
    decayed, spared = ({names[p] for p in group["params"]} for group in (decayed, spared))
    assert {"encoder.cls_token", "regressor.mask_token", "encoder.patch_embed.weight"} <= decayed
    assert spared == {n for n, p in method.named_parameters() if p.ndim == 1}
    assert {"encoder.blocks.0.gamma_1", "encoder.blocks.0.attn.qkv.q_bias", "decoder.norm.weight"} <= spared


def test_cae_export_is_the_encoder_alone(small):
    method = build(tokenizer=Brightness())
    assert set(method.export()) == {n for n, _ in method.encoder.named_parameters()}
    rebuilt = method.encoder_class(method.model)(method.model, **method.encoder.design)
    rebuilt.load_state_dict(method.export())
    images = make_batch(method).crops[0]
    assert torch.equal(rebuilt.features(images), method.encoder.features(images))


def test_cae_is_found_by_its_name():
    assert base.find("cae").METHOD is cae.CAE and set(cae.PRESETS) >= {"demo", "paper"}


def test_cae_paper_preset_is_the_published_recipe():
    preset = cae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(method="cae"), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=2048, epochs=300.0, betas=(0.9, 0.999),
        weight_decay=0.05, warmup="10ep", warmup_start=0.0, clip=3.0, lr=None, schedule="cosine",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(1.5e-3, rel=1e-12)
    assert config.peak_lr * config.lr_end == pytest.approx(1e-5, rel=1e-12)
    options = dict(
        target="auto", tokenizer=None, tokens=None, mask="block", mask_ratio=0.5, norm_pix=True, crop_scale=(0.08, 1.0),
        regressor_depth=4, decoder_depth=4, decoder_width=None, decoder_heads=None, layer_scale=None, decoder_layer_scale=None,
        drop_path=0.1, align_weight=2.0, init="auto",
    )  # fmt: skip
    assert dataclasses.asdict(preset.options) == options
    assert preset.models["vit_large"] == dict(epochs=1600.0, warmup="40ep")


def test_cae_demo_preset_builds_and_runs():
    preset = cae.PRESETS["demo"]
    config = dataclasses.replace(TrainConfig(method="cae"), **preset.train)
    method = base.build("cae", config.model_spec(), preset.options, 0)
    batch, rng = make_batch(method, 4), make_rng()
    assert method.model.grid == (6, 6) and method.mask(rng, batch.ids).ids_masked.shape == (4, 18)
    assert method(batch, rng).loss.isfinite()
