"""MixedAE in training: randomness, side effects, processes, pictures, sizes, weight decay, export, presets."""

import dataclasses
import math

import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from method_checks import assert_no_side_effects, assert_parts_average, assert_repeats, learn, others_of, waves
from slow_mixedae import DECODER, GRID, build, groups_of
from slow_reference import cut_view, make_batch, make_rng, model_spec, patch_rows
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.config import SIZES, ConfigError, Size, TrainConfig
from fastmim.methods import base, mixedae

# ---- randomness, side effects, processes


def test_mixedae_repeats_bit_for_bit_and_changes_with_step_seed_and_ids(small):
    method = build()
    batch, rng = groups_of(method), make_rng()
    assert_repeats(method, batch, rng)
    sources = method._sources(batch.ids, rng)
    for other, at in others_of(batch, rng):
        assert not torch.equal(method._sources(other.ids, at), sources)


@pytest.mark.parametrize(
    "options",
    [{}, dict(mode="full", members=3), dict(cls_mode="per_image")],
    ids=["compose", "full", "class_per_image"],
)
def test_mixedae_ranks_and_micro_batches_of_whole_groups_average_to_the_full_batch(small, options):
    method = build(**options)
    assert_parts_average(method, groups_of(method, 3), make_rng(), method.config.members)


def test_mixedae_forward_has_no_side_effects(small):
    method = build()
    assert_no_side_effects(method, groups_of(method), make_rng())


class NoHostReads(TorchDispatchMode):
    """Raises where the host would wait for the device: a number read, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    ["all", "full", "oracle_no_class_token", "unequal_shares_full", "mlp", "class_per_image", "diagnostics_oracle"],
)
def test_mixedae_reads_nothing_back_from_the_device(small, monkeypatch, name):
    # On CPUs, where a look costs nothing, kernels check the values of their arguments, and native ones take numbers.
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")
    monkeypatch.setattr("fastmim_kernels.checks.is_readable", lambda tensor: False)
    monkeypatch.setattr("fastmim_kernels.mixing.is_readable", lambda tensor: False)
    method = build(**GRID[name])
    batch, rng = groups_of(method), make_rng()
    with NoHostReads():
        method(batch, rng).loss.backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            batch.ids[0].item()


def test_mixedae_learns_32_images_and_to_recognize_patches_of_one(monkeypatch):
    """Fixed pictures and mixtures: the pixel loss falls far below what predicting 0 costs (15 / 16), the contrast from
    chance, log(15) = 2.71, towards its floor, log(7) = 1.95, and the last block finds its own image better than by chance. The last holds for this
    start, not for all: the contrast does not secure it, see docs/methods.md.
    """
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    config = mixedae.Config(members=2, contrast_weight=1.0, decoder_width=64, decoder_depth=1, decoder_heads=4)
    method = mixedae.MixedAE(model_spec(16, 16, 4, 1), config)
    first, *_, last = learn(method, Batch((waves(32),), torch.arange(32)), steps=250, peak=2e-3, betas=(0.9, 0.95))
    assert first["pixel"] > 0.9 and last["pixel"] < 0.3
    assert first["contrast"] > 2.7 and math.log(7) < last["contrast"] < 2.3
    assert first["topk_accuracy/01"] < 0.52 and last["topk_accuracy/01"] > 0.6


# ---- pictures


@pytest.mark.parametrize("options", [dict(members=2), dict(members=5, mode="full"), dict(cls_mode="none"),
                                     dict(cls_mode="per_image")], ids=str)  # fmt: skip
def test_mixedae_pictures_show_view_own_patches_and_prediction(small, options):
    method = build(norm_pix=False, **options)
    members = method.config.members
    batch, rng = groups_of(method), make_rng()
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    src = method._sources(batch.ids, rng)
    latent, _ = method._encode(batch.crops[0], src)
    m = method.model
    pred = method.decoder(latent[:, 1 if options.get("cls_mode") == "none" else 0 :], src).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).repeat(16) for v in (m.mean, m.std))
    for i in range(2 * members):
        view = cut_view(batch.crops[0][i], m.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(pictures.view[i].double(), view, rtol=0, atol=1e-5)
        masked, output = (patch_rows(picture[i].double(), 4) for picture in (pictures.masked, pictures.output))
        for position, values in enumerate(patch_rows(view, 4)):
            if src[i // members, position] == i % members:
                torch.testing.assert_close(masked[position], values, rtol=0, atol=1e-5)
                torch.testing.assert_close(output[position], values, rtol=0, atol=1e-5)
            else:
                assert (masked[position] == 0.5).all()
                expected = (pred[i, position] * std + mean).clamp(0, 1)
                torch.testing.assert_close(output[position], expected, rtol=0, atol=1e-5)


def test_mixedae_pictures_are_of_whole_groups(small):
    method = build()
    batch = make_batch(method, 7)
    pictures = method.reconstruct(batch.crops[0], batch.ids, make_rng())
    assert [len(p) for p in pictures] == [4, 4, 4]
    assert method.reconstruct(batch.crops[0][:3], batch.ids[:3], make_rng()) is None


# ---- sizes, weight decay, export, presets


def test_mixedae_base_has_mae_s_parameters_and_the_segments():
    with torch.device("meta"):
        method = mixedae.MixedAE(model_spec(224, 224, 16, 3, "vit_base"), mixedae.Config())
    assert sum(p.numel() for p in method.parameters()) == 111_655_680 + 4 * 768


def test_mixedae_projection_is_two_layers_to_256_and_starts_like_the_rest():
    """And is left out where no loss uses it."""
    torch.manual_seed(0)
    method = mixedae.MixedAE(model_spec(), mixedae.Config(projection="mlp", **DECODER))
    first, last = method.projector[0], method.projector[2]
    assert (first.weight.shape, last.weight.shape) == ((192, 192), (256, 192))
    for layer in (first, last):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.98 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6) and not layer.bias.any()
    without = mixedae.MixedAE(model_spec(), mixedae.Config(projection="mlp", contrast_weight=0.0, **DECODER))
    assert not any(n.startswith("projector") for n, _ in without.named_parameters())


def test_mixedae_segments_start_at_002_and_are_optional():
    torch.manual_seed(0)
    method = mixedae.MixedAE(model_spec(48, 48, 4, 3, "vit_base"), mixedae.Config(members=8, **DECODER))
    assert method.segments.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(method.segments.weight.mean().item()) < 4 * 0.02 / math.sqrt(8 * 768)
    assert not hasattr(build(members=2, use_segments=False), "segments")


def test_mixedae_spares_vectors_and_segments_from_weight_decay(small):
    """MAE's rule, by which the class token and the mask token are decayed."""
    method = build(projection="mlp")
    spared = {n for n, p in method.named_parameters() if method.no_decay(n, p)}
    decayed = {n for n, _ in method.named_parameters()} - spared
    assert {"segments.weight", "encoder.norm.weight"} <= spared
    assert {n for n in decayed if not n.endswith("weight")} == {"encoder.cls_token", "decoder.mask_token"}
    assert not any("norm" in n for n in decayed)
    assert {"projector.0.weight", "encoder.patch_embed.weight", "decoder.blocks.1.fc2.weight"} <= decayed
    assert spared - {n for n, p in method.named_parameters() if p.ndim == 1} == {"segments.weight"}


def test_mixedae_export_is_the_plain_encoder(small):
    method = build()
    assert set(method.export()) == {n for n, _ in method.encoder.named_parameters()}
    assert not any("segment" in n for n in method.export())
    assert method.ema_pairs() == [] and not method.mixes_images and method.batch_multiple == method.config.members


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(members=1), r"--mixedae.members: expected 2..12, at least 2 of the 24 patches for each image, got 1"),
        (dict(members=13), r"--mixedae.members: expected 2..12.*got 13; mix fewer"),
        (dict(topk=25), r"--mixedae.topk: expected 1..24, the number of patches, got 25"),
        (dict(topk=0), r"--mixedae.topk: expected 1..24"),
        (dict(homo_layers=3), r"--mixedae.homo-layers: expected all, all_but_first or 1..2, .* got 3"),
        (dict(homo_layers=0), r"--mixedae.homo-layers"),
        (dict(contrast_weight=-0.1), r"--mixedae.contrast-weight"),
        (dict(temperature=0.0), r"--mixedae.temperature"),
        (
            dict(cls_mode="per_image", use_segments=False),
            r"--mixedae.cls-mode per_image: expected --mixedae.use-segments",
        ),
    ],
    ids=str,
)
def test_mixedae_refuses_options_out_of_range(small, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_mixedae_asks_for_one_crop_of_the_view_s_size(small):
    method = build(crop_scale=(0.3, 0.9))
    assert method.crops == (CropSpec(size=(16, 24), scale=(0.3, 0.9), ratio=(3 / 4, 4 / 3)),)


def test_mixedae_is_found_by_its_name():
    assert base.find("mixedae").METHOD is mixedae.MixedAE and set(mixedae.PRESETS) >= {"demo", "paper"}


def test_mixedae_presets_fill_their_groups():
    for preset in mixedae.PRESETS.values():
        assert preset.train["batch_size"] % preset.options.members == 0
        with torch.device("meta"):
            config = dataclasses.replace(TrainConfig(method="mixedae", options=preset.options), **preset.train)
            mixedae.MixedAE(config.model_spec(), preset.options)


def test_mixedae_paper_preset_is_mae_s_recipe_with_1024_images():
    preset = mixedae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(method="mixedae"), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=1024, epochs=300.0, betas=(0.9, 0.95),
        weight_decay=0.05, warmup="40ep", warmup_start=0.0, clip=None, base_lr=1.5e-4, lr=None,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(6e-4, rel=1e-12)
    options = dict(
        members=4, mode="compose", homologous="topk", topk=None, homo_layers="all", cls_mode="shared",
        use_segments=True, contrast_weight=0.1, temperature=0.25, projection="none", norm_pix=True, diagnostics=False,
        crop_scale=(0.2, 1.0), decoder_width=512, decoder_depth=8, decoder_heads=16,
    )  # fmt: skip
    assert dataclasses.asdict(preset.options) == options
