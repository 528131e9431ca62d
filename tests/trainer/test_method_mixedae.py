"""MixedAE against a slow re-computation in float64: both losses, every option, groups, accuracy."""

import math

import pytest
import torch
from slow_mixedae import DECODER, GRID, IDS, NAIVE, SHAPES, build, draw_sources, groups_of, slow_terms
from slow_reference import (
    SMALL,
    assert_same_gradients,
    block,
    cut_view,
    doubles,
    draw_flips,
    layer_norm,
    linear,
    make_batch,
    make_rng,
    model_spec,
    pixel_loss,
    position_table,
    under,
)

from fastmim.config import SIZES, Size
from fastmim.homologous import own_share
from fastmim.methods import mixedae


def assert_equals_slow(method, batch, rng):
    output = method(batch, rng)
    weights = doubles(method)
    pixel, contrast, measures = slow_terms(method, weights, batch, rng)
    weight = method.config.contrast_weight
    slow = pixel + weight * contrast
    assert output.loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert output.parts["pixel"].item() == pytest.approx(pixel.item(), rel=1e-5)
    assert set(output.parts) == ({"pixel", "contrast"} if weight else {"pixel"})
    if weight:
        assert output.parts["contrast"].item() == pytest.approx(weight * contrast.item(), rel=1e-5)
    assert {name: value.item() for name, value in output.measures.items()} == pytest.approx(measures, rel=1e-5)
    assert not any(t.requires_grad for t in [*output.parts.values(), *output.measures.values()])
    output.loss.backward()
    slow.backward()
    assert_same_gradients(method, weights)
    # DDP waits for every parameter: none may be outside of the graph.
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize("options", GRID.values(), ids=GRID)
def test_mixedae_losses_gradients_and_accuracy_equal_the_slow_recomputation(small, options):
    method = build(**options)
    batch, rng = groups_of(method), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    assert_equals_slow(method, batch, rng)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=IDS[1:])
def test_mixedae_of_other_grids_and_channels_equals_the_slow_recomputation(small, shape):
    method = build(shape, members=3)
    assert_equals_slow(method, groups_of(method), make_rng())


def test_every_option_of_the_ablation_changes_the_loss(small):
    """Otherwise the comparison above could not tell them apart."""
    losses = set()
    for name in ("naive", "segments", "topk", "topk_segments", "all", "oracle", "oracle_all"):
        method = build(**GRID[name])
        losses.add(round(method(groups_of(method), make_rng()).loss.item(), 6))
    assert len(losses) == 7


# ---- mixtures


def test_mixedae_at_224_shows_49_and_hides_147_patches_of_each_of_4_images():
    with torch.device("meta"):
        method = mixedae.MixedAE(model_spec(224, 224, 16, 3, "vit_base"), mixedae.Config())
    assert method.topk == 49
    src = method._sources(torch.arange(8), make_rng())
    plan = mixedae.mask_plan(src, 4)
    assert plan.ids_keep.shape == (8, 49) and plan.ids_masked.shape == (8, 147)
    assert torch.equal(plan.mask.sum(1), torch.full((8,), 147.0))
    assert torch.equal((1 - plan.mask).view(2, 4, 196).sum(1), torch.ones(2, 196))
    for i in range(8):
        assert plan.ids_keep[i].tolist() == [p for p in range(196) if src[i // 4, p] == i % 4]
        assert plan.ids_masked[i].tolist() == [p for p in range(196) if src[i // 4, p] != i % 4]
    drawn = torch.cat([plan.ids_keep, plan.ids_masked], 1)
    assert torch.equal(drawn.gather(1, plan.ids_restore), torch.arange(196).expand(8, -1))


@pytest.mark.parametrize("members", [3, 4, 5])
def test_mixedae_full_mode_shows_every_patch_of_every_image_once(small, monkeypatch, members):
    seen, real = [], mixedae.mix_patches
    monkeypatch.setattr(
        mixedae, "mix_patches", lambda images, src, *a, **kw: seen.append(src) or real(images, src, *a, **kw)
    )
    method = build(mode="full", members=members)
    method(groups_of(method), make_rng())
    assert len(seen) == members
    for g in range(2):
        used = [(int(member), position) for src in seen for position, member in enumerate(src[g])]
        assert sorted(used) == [(j, position) for j in range(members) for position in range(24)]


def test_mixedae_groups_are_consecutive_images_and_follow_the_first_id(small):
    method = build()
    ids, rng = torch.arange(12) * 5 + 3, make_rng()
    src = method._sources(ids, rng)
    assert src.tolist() == draw_sources(rng, ids, 24, 4)
    assert torch.equal(method._sources(ids[4:8], rng), src[1:2])
    assert len(src.unique(dim=0)) == 3


def test_mixedae_refuses_a_batch_that_groups_do_not_fill(small):
    method = build()
    batch = make_batch(method, 6)
    with pytest.raises(ValueError, match=r"batch: expected a multiple of mixedae.members = 4 images .* got 6; change"):
        method(batch, make_rng())


# ---- homologous attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("members", [4, 5])
def test_mixedae_oracle_is_mae_s_encoder_on_each_image(small, members, dtype, tolerance):
    """Without class token and segments: the tokens of an image are what its visible patches alone give."""
    method = build(members=members, homologous="oracle", cls_mode="none", use_segments=False).to(dtype)
    batch, rng = groups_of(method), make_rng()
    src = method._sources(batch.ids, rng)
    patches = method.pixels.patches(batch.crops[0], None).to(dtype)
    mixed = patches.view(2, members, 24, -1)[torch.arange(2)[:, None], src, torch.arange(24)]
    latent = method.encoder(mixed, attend=method._attends(src, []))[:, 1:]
    weights = doubles(method)
    w = under(weights, "encoder")
    for i, image in enumerate(patches.double()):
        own = [p for p in range(24) if src[i // members, p] == i % members]
        x = linear(w, "patch_embed", image[own]) + position_table(SMALL[0], (4, 6), "column")[1:][own]
        for b in range(SMALL[1]):
            x = block(under(w, f"blocks.{b}"), x, SMALL[2])
        # The encoder's position table is float32.
        alone = layer_norm(w, "norm", x)
        limit = max(tolerance, 1e-6)
        torch.testing.assert_close(latent[i // members, own].double(), alone, rtol=0, atol=limit)
        # The encoder itself, given one image's patches, as MAE gives them.
        ids = torch.tensor([own])
        itself = method.encoder(image[own][None].to(dtype), ids, attend=mixedae.without_class_token(mixedae.attention))
        torch.testing.assert_close(itself[0, 1:], latent[i // members, own], rtol=0, atol=tolerance)


@pytest.mark.parametrize("members", [4, 5])
def test_mixedae_oracle_with_class_tokens_of_single_images_is_mae_s_encoder_with_its_own(small, members):
    """Without segments: class token and visible patches of each image, as MAE's encoder gives them."""
    method = build(members=members, homologous="oracle", cls_mode="per_image", use_segments=False).double()
    batch, rng = groups_of(method), make_rng()
    src = method._sources(batch.ids, rng)
    patches = method.pixels.patches(batch.crops[0], None).double()
    mixed = patches.view(2, members, 24, -1)[torch.arange(2)[:, None], src, torch.arange(24)]
    classes = torch.zeros(members, SMALL[0], dtype=torch.float64)
    latent = method.encoder(mixed, classes=classes, attend=method._attends(src, []))
    assert latent.shape == (2, members + 24, SMALL[0])
    for i, image in enumerate(patches):
        group, member = divmod(i, members)
        own = [p for p in range(24) if src[group, p] == member]
        alone = method.encoder(image[own][None], torch.tensor([own]))[0]
        torch.testing.assert_close(latent[group, [member, *(members + p for p in own)]], alone, rtol=0, atol=1e-12)


def test_mixedae_class_tokens_of_single_images_carry_their_segments(small):
    method = build(cls_mode="per_image")
    batch, rng = groups_of(method), make_rng()
    given = []
    real = method.encoder.forward
    method.encoder.forward = lambda *a, **kw: given.append(kw["classes"]) or real(*a, **kw)
    method(batch, rng)
    assert torch.equal(given[0], method.segments.weight)


def test_mixedae_decoders_get_the_class_token_of_their_own_image(small):
    """Another value in one class token's place changes the prediction of one image, in every group."""
    method = build(cls_mode="per_image")
    src = method._sources(groups_of(method).ids, make_rng())
    latent = torch.randn(2, 4 + 24, SMALL[0])
    before = method.decoder(latent, src).view(2, 4, 24, -1)
    latent[:, 2] = torch.randn(SMALL[0])
    after = method.decoder(latent, src).view(2, 4, 24, -1)
    assert [torch.equal(before[:, j], after[:, j]) for j in range(4)] == [True, True, False, True]


def test_attention_within_images_of_many_images_equals_loops():
    """20 images, heads of 8 channels: their marks need three calls. Three prefix tokens are left out of the account."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 43, 8, generator=g).unbind(0)
    src = torch.stack([torch.randperm(40, generator=g) % 20 for _ in range(2)])
    shares = []
    for b in range(2):
        for h in range(3):
            weights = torch.exp(q[b, h].double() @ k[b, h].double().T / math.sqrt(8))[3:, 3:]
            for i, row in enumerate(weights):
                shares.append(float(row[src[b] == src[b, i]].sum() / row.sum()))
    found = own_share(mixedae.attention, q, k, src, 20, 3)
    assert found.item() == pytest.approx(sum(shares) / len(shares), rel=1e-5)


def test_mixedae_diagnostics_change_nothing_else(small):
    for name in ("class_per_image", "unequal_class_per_image", "diagnostics_full"):
        options = GRID[name] | dict(diagnostics=False)
        watched, plain = build(**GRID[name]), build(**options)
        batch, rng = groups_of(plain), make_rng()
        one, other = watched(batch, rng), plain(batch, rng)
        assert torch.equal(one.loss, other.loss) and other.measures.items() <= one.measures.items()
        one.loss.backward()
        other.loss.backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))


def test_mixedae_images_meet_nowhere_with_oracle_and_no_shared_class_token(small):
    """Other images of the mixture may change as they like; with a shared class token or top-K they do not stay out."""
    for options, is_apart in (
        (dict(homologous="oracle", cls_mode="none"), True),
        (dict(homologous="oracle", cls_mode="per_image"), True),
        (dict(homologous="oracle"), False),
        (dict(cls_mode="per_image"), False),
        (dict(cls_mode="none"), False),
    ):
        method = build(**options)
        batch, rng = groups_of(method, 1), make_rng()
        other = batch.crops[0].clone()
        other[1:] = 255 - other[1:]
        before = method.reconstruct(batch.crops[0], batch.ids, rng).output[0]
        assert torch.equal(method.reconstruct(other, batch.ids, rng).output[0], before) == is_apart


def test_mixedae_of_all_keys_is_naive_mixing(small):
    naive, all_keys = build(**NAIVE), build(**(NAIVE | dict(homologous="topk", topk=24)))
    batch, rng = groups_of(naive), make_rng()
    one, other = naive(batch, rng), all_keys(batch, rng)
    assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-6)
    # Every key is kept, a quarter of them rightly.
    assert other.measures["topk_accuracy/00"].item() == pytest.approx(0.25, abs=1e-6)


def test_mixedae_accuracy_starts_at_chance_without_segments(monkeypatch):
    """1/4 of 196 patches, fresh weights; random pixels have nothing in common within an image."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(48, 2, 3))
    torch.manual_seed(0)
    method = mixedae.MixedAE(model_spec(56, 56, 4, 3), mixedae.Config(use_segments=False, **DECODER))
    with torch.no_grad():
        output = method(make_batch(method, 16), make_rng())
    assert method.topk == 49
    for accuracy in output.measures.values():
        assert accuracy.item() == pytest.approx(0.25, abs=0.01)


def test_mixedae_segments_reach_the_patches_alone(small):
    """A vector per member, added to its patches; the class token and the decoder get none."""
    method = build(contrast_weight=0.0, homologous="none")
    batch, rng = groups_of(method), make_rng()
    src = method._sources(batch.ids, rng)
    given = []
    real = method.encoder.forward
    method.encoder.forward = lambda *a, **kw: given.append(kw["extra"]) or real(*a, **kw)
    method(batch, rng)
    assert torch.equal(given[0], method.segments.weight[src])
    assert method.segments.weight.shape == (4, SMALL[0])


# ---- both losses


def test_mixedae_loss_ignores_predictions_on_visible_patches(small):
    """All rows predicted, those the mixture shows spoilt: their mean over hidden patches is the method's pixel loss."""
    for members in (4, 5):
        method = build(members=members)
        batch, rng = groups_of(method), make_rng()
        m, flips = method.model, draw_flips(rng, batch.ids)
        src = method._sources(batch.ids, rng)
        latent, _ = method._encode(batch.crops[0], src, flip=torch.tensor(flips))
        full = method.decoder(latent, src).detach().double()
        hidden = [[p for p in range(24) if src[i // members, p] != i % members] for i in range(len(full))]
        for rows, ids in zip(full, hidden):
            rows[[p for p in range(24) if p not in ids]] = 1e6
        views = [cut_view(x, m.image_size, 0, 0, f, m.mean, m.std) for x, f in zip(batch.crops[0], flips)]
        slow = pixel_loss(list(full), views, hidden, m.patch_size, True)
        assert method(batch, rng).parts["pixel"].item() == pytest.approx(slow.item(), rel=1e-5)


def test_mixedae_contrast_of_equal_features_is_the_logarithm_of_the_others(small):
    """All tokens alike: log(23) times the weight, whatever the temperature."""
    method = build(contrast_weight=0.5, temperature=0.05)
    with torch.no_grad():
        method.encoder.norm.weight.zero_()
    assert method(groups_of(method), make_rng()).parts["contrast"].item() == pytest.approx(0.5 * math.log(23), rel=1e-5)


def test_mixedae_zero_prediction_costs_v_minus_1_over_v(small):
    method = build(members=5)
    torch.nn.init.zeros_(method.decoder.pred.weight)
    torch.nn.init.zeros_(method.decoder.pred.bias)
    assert method(groups_of(method), make_rng()).parts["pixel"].item() == pytest.approx(47 / 48, rel=2e-5)


@pytest.mark.parametrize(
    "options",
    [{}, dict(mode="full"), dict(homologous="oracle"), dict(cls_mode="per_image")],
    ids=["compose", "full", "oracle", "class_per_image"],
)
def test_mixedae_in_bfloat16_is_within_2_percent(small, options):
    method = build(**options)
    batch, rng = groups_of(method), make_rng()
    exact = method(batch, rng)
    with torch.autocast("cpu", torch.bfloat16):
        low = method(batch, rng)
    assert low.loss.dtype == torch.float32
    for name, value in exact.parts.items():
        assert low.parts[name].item() == pytest.approx(value.item(), rel=2e-2)
    assert not torch.equal(low.loss, exact.loss), "autocast was on"
