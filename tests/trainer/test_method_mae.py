"""MAE against a slow re-computation in float64: loss, gradients, masks, targets, pictures, presets."""

import dataclasses
import math

import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from method_checks import assert_no_side_effects, assert_parts_average, assert_repeats, learn, others_of, waves
from slow_reference import (
    SMALL,
    assert_same_gradients,
    cut_view,
    doubles,
    draw_flips,
    draw_visible,
    mae_loss,
    make_batch,
    make_rng,
    model_spec,
    patch_rows,
    pixel_loss,
    scramble,
)

from fastmim.config import SIZES, Size, TrainConfig
from fastmim.masking import MaskPlan
from fastmim.methods import base, mae

# (height, width, patch, channels)
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5), (224, 224, 16, 3)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
DECODER = dict(decoder_width=32, decoder_depth=2, decoder_heads=4)


def encode(method, batch, rng):
    """(latent, plan, flips) of the training view."""
    flip = torch.tensor(draw_flips(rng, batch.ids))
    return *method._encode(batch.crops[0], batch.ids, rng, flip=flip), flip


def build(shape=SHAPES[0], seed=0, **options):
    torch.manual_seed(seed)
    method = mae.MAE(model_spec(*shape), mae.Config(**(DECODER | options)))
    scramble(method, seed)
    return method


def slow_loss(method, weights, batch, rng, normalize=True):
    kept = method.model.num_patches // 4
    sizes = dict(heads=SMALL[2], decoder_heads=DECODER["decoder_heads"])
    return mae_loss(method, weights, batch, rng, normalize=normalize, kept=kept, **sizes)


# ---- the whole method


@pytest.mark.parametrize("normalize", [True, False], ids=["norm_pix", "pixels"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=IDS[:3])
def test_mae_loss_and_gradients_equal_the_slow_recomputation(small, shape, normalize):
    method = build(shape, norm_pix=normalize)
    batch, rng = make_batch(method), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    output = method(batch, rng)
    weights = doubles(method)
    slow = slow_loss(method, weights, batch, rng, normalize)
    assert output.loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert output.parts["pixel"].item() == output.loss.item() and not output.parts["pixel"].requires_grad
    output.loss.backward()
    slow.backward()
    assert all(w.grad is not None for w in weights.values()), "every parameter takes part"
    assert_same_gradients(method, weights)


def test_mae_loss_of_fresh_vit_tiny_equals_the_slow_recomputation():
    """Unscaled vit_tiny, initial weights, wider decoder, one image."""
    torch.manual_seed(1)
    method = mae.MAE(model_spec(), mae.Config(decoder_width=64, decoder_depth=1, decoder_heads=2))
    batch, rng = make_batch(method, 1), make_rng()
    slow = mae_loss(method, doubles(method), batch, rng, normalize=True, kept=6, heads=3, decoder_heads=2)
    assert method(batch, rng).loss.item() == pytest.approx(slow.item(), rel=1e-5)


def test_mae_loss_at_224_with_16_pixel_patches(small):
    """49 visible and 147 masked patches; the published grid."""
    method = build(SHAPES[3])
    batch, rng = make_batch(method, 2), make_rng()
    plan = method.mask(rng, batch.ids)
    assert plan.ids_keep.shape == (2, 49) and plan.ids_masked.shape == (2, 147)
    slow = slow_loss(method, doubles(method), batch, rng)
    assert method(batch, rng).loss.item() == pytest.approx(slow.item(), rel=1e-5)


def test_mae_asks_for_one_crop_of_the_view_s_size(small):
    method = build(crop_scale=(0.3, 0.9))
    assert method.crops == (CropSpec(size=(16, 24), scale=(0.3, 0.9), ratio=(3 / 4, 4 / 3)),)


# ---- masks


def test_mae_masks_keep_the_smallest_noise_and_restore_undoes_it(small):
    method = build()
    ids, rng = torch.arange(40), make_rng()
    plan = method.mask(rng, ids)
    slow = draw_visible(rng, ids, 24, 6)
    assert plan.ids_keep.tolist() == slow
    drawn = torch.cat([plan.ids_keep, plan.ids_masked], 1)
    assert torch.equal(drawn.gather(1, plan.ids_restore), torch.arange(24).expand(40, -1))
    assert torch.equal(plan.mask.sum(1), torch.full((40,), 18.0))
    for row, kept in zip(plan.mask, slow):
        assert all(row[i] == (0 if i in kept else 1) for i in range(24))


def test_mae_masks_are_independent_of_the_batch_around_an_image(small):
    method = build()
    rng = make_rng()
    whole = method.mask(rng, torch.tensor([5, 6, 7]))
    alone = method.mask(rng, torch.tensor([7]))
    assert torch.equal(whole.ids_keep[2:], alone.ids_keep)
    assert not torch.equal(whole.ids_keep[0], whole.ids_keep[1])


def test_mae_masks_every_patch_equally_often(small):
    method = build()
    rate = method.mask(make_rng(), torch.arange(8000)).mask.mean(0)
    # Binomial: sqrt(.75 * .25 / 8000) = .0048; five of them.
    assert (rate - 0.75).abs().max() < 0.025


# ---- what the loss depends on


def test_mae_loss_ignores_the_order_of_visible_patches(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    before = method(batch, rng).loss
    plan = method.mask(rng, batch.ids)
    keep = torch.stack([row[torch.randperm(len(row))] for row in plan.ids_keep])
    masked = torch.stack([row[torch.randperm(len(row))] for row in plan.ids_masked])
    assert not torch.equal(keep, plan.ids_keep)
    restore = torch.cat([keep, masked], 1).argsort(1)
    method.mask = lambda rng, ids: MaskPlan(keep, masked, restore, plan.mask)
    assert method(batch, rng).loss.item() == pytest.approx(before.item(), rel=1e-6)


def test_mae_loss_with_nothing_hidden_of_the_encoder_ignores_order(small):
    """All but one patch visible: the encoder's input order is the only thing that changes."""
    method = build()
    batch, rng = make_batch(method), make_rng()
    order = torch.arange(24).expand(len(batch.ids), -1)
    losses = []
    for keep in (order[:, :23], order[:, :23].flip(1)):
        restore = torch.cat([keep, order[:, 23:]], 1).argsort(1)
        plan = MaskPlan(keep.contiguous(), order[:, 23:].contiguous(), restore, (order == 23).float())
        method.mask = lambda rng, ids, plan=plan: plan
        losses.append(method(batch, rng).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_mae_loss_ignores_predictions_on_visible_patches(small):
    """All rows predicted, those on visible patches spoilt: the masked mean over all rows is the method's loss."""
    method = build()
    batch, rng = make_batch(method), make_rng()
    latent, plan, flip = encode(method, batch, rng)
    full = method.decoder(latent, plan.ids_restore).detach().double()
    full[plan.mask == 0] = 1e6
    m = method.model
    views = [cut_view(c, m.image_size, 0, 0, bool(f), m.mean, m.std) for c, f in zip(batch.crops[0], flip)]
    masked = [row.nonzero()[:, 0].tolist() for row in plan.mask]
    slow = pixel_loss(list(full), views, masked, m.patch_size, True)
    assert method(batch, rng).loss.item() == pytest.approx(slow.item(), rel=1e-5)


def test_mae_encoder_sees_visible_pixels_only_and_targets_are_masked_pixels_only(small):
    """Noise in the masked patches leaves the latent as it is; noise in the visible ones leaves the targets."""
    method = build()
    batch, rng = make_batch(method), make_rng()
    latent, plan, flip = encode(method, batch, rng)
    pred = method.decoder(latent, plan.ids_restore, plan.ids_masked)
    is_masked = plan.mask.view(-1, 1, 4, 6).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    is_masked = torch.where(flip.view(-1, 1, 1, 1), is_masked.flip(3), is_masked)
    crop = batch.crops[0]
    noise = torch.randint(0, 256, crop.shape, dtype=torch.uint8)
    spoilt_masked = torch.where(is_masked, noise, crop)
    spoilt_visible = torch.where(is_masked, crop, noise)
    assert torch.equal(encode(method, Batch((spoilt_masked,), batch.ids), rng)[0], latent)
    assert not torch.equal(encode(method, Batch((spoilt_visible,), batch.ids), rng)[0], latent)
    loss = method.pixels.loss(pred, crop, plan.ids_masked, flip=flip)
    assert torch.equal(method.pixels.loss(pred, spoilt_visible, plan.ids_masked, flip=flip), loss)
    assert not torch.equal(method.pixels.loss(pred, spoilt_masked, plan.ids_masked, flip=flip), loss)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=[IDS[0], IDS[3]])
def test_mae_zero_prediction_costs_v_minus_1_over_v_with_norm_pix(small, shape):
    """The unbiased variance makes the targets' mean square (V - 1) / V: 767 / 768 = .9987 at 16 x 16 x 3."""
    method = build(shape)
    torch.nn.init.zeros_(method.decoder.pred.weight)
    torch.nn.init.zeros_(method.decoder.pred.bias)
    values = method.model.patch_values
    loss = method(make_batch(method, 2), make_rng()).loss.item()
    assert loss == pytest.approx((values - 1) / values, rel=2e-5)


def test_mae_zero_prediction_costs_the_pixels_mean_square_without_norm_pix(small):
    method = build(norm_pix=False)
    torch.nn.init.zeros_(method.decoder.pred.weight)
    torch.nn.init.zeros_(method.decoder.pred.bias)
    batch, rng = make_batch(method), make_rng()
    m = method.model
    squares = []
    for crop, flip, kept in zip(batch.crops[0], draw_flips(rng, batch.ids), draw_visible(rng, batch.ids, 24, 6)):
        rows = patch_rows(cut_view(crop, m.image_size, 0, 0, flip, m.mean, m.std), 4)
        squares += [float((rows[i] ** 2).mean()) for i in range(24) if i not in kept]
    assert method(batch, rng).loss.item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_mae_constant_patches_give_a_finite_loss_and_zero_target(small):
    method = build(SHAPES[1])
    torch.nn.init.zeros_(method.decoder.pred.weight)
    torch.nn.init.zeros_(method.decoder.pred.bias)
    batch = make_batch(method)
    gray = Batch((torch.full_like(batch.crops[0], 37),), batch.ids)
    assert method(gray, make_rng()).loss.item() == pytest.approx(0, abs=1e-6)


def test_mae_norm_pix_adds_1e_6_to_the_variance(small):
    """Gray pictures of two neighboring levels: their variance, 6e-5, is not far above the eps."""
    method = build(SHAPES[1])
    batch, rng = make_batch(method), make_rng()
    faint = Batch((batch.crops[0] % 2 + 100,), batch.ids)
    slow = slow_loss(method, doubles(method), faint, rng)
    assert method(faint, rng).loss.item() == pytest.approx(slow.item(), rel=1e-5)


# ---- side effects, repetition, micro-batches


def test_mae_forward_has_no_side_effects(small):
    method = build()
    assert_no_side_effects(method, make_batch(method), make_rng())


def test_mae_repeats_bit_for_bit_and_changes_with_step_seed_and_ids(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    assert_repeats(method, batch, rng)
    keep = method.mask(rng, batch.ids).ids_keep
    for other, at in others_of(batch, rng):
        assert not torch.equal(method.mask(at, other.ids).ids_keep, keep)


def test_mae_micro_batches_average_to_the_full_batch(small):
    method = build()
    assert_parts_average(method, make_batch(method, 6), make_rng(), 2)


def test_mae_overfits_32_images(monkeypatch):
    """Fixed pictures and masks: the loss falls below .2, a fifth of what predicting 0 costs (15 / 16)."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    method = mae.MAE(model_spec(16, 16, 4, 1), mae.Config(decoder_width=64, decoder_depth=1, decoder_heads=4))
    first, *_, last = learn(method, Batch((waves(32),), torch.arange(32)), steps=250, peak=5e-3, betas=(0.9, 0.95))
    assert first["loss"] > 0.9
    assert last["loss"] < 0.2


# ---- pictures


@pytest.mark.parametrize("normalize", [True, False], ids=["norm_pix", "pixels"])
def test_mae_pictures_show_view_mask_and_prediction(small, normalize):
    method = build(norm_pix=normalize)
    batch, rng = make_batch(method, 2), make_rng()
    plan = method.mask(rng, batch.ids)
    latent = method.encoder(method.pixels.patches(batch.crops[0], plan.ids_keep), plan.ids_keep)
    pred = method.decoder(latent, plan.ids_restore).double()
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    m, flip = method.model, False
    for i in range(len(batch.ids)):
        view = cut_view(batch.crops[0][i], m.image_size, 0, 0, flip, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(pictures.view[i].double(), view, rtol=0, atol=1e-5)
        rows = patch_rows(cut_view(batch.crops[0][i], m.image_size, 0, 0, flip, m.mean, m.std), 4)
        for patch_id in range(24):
            top, left = patch_id // 6 * 4, patch_id % 6 * 4
            at = (i, slice(None), slice(top, top + 4), slice(left, left + 4))
            if not plan.mask[i, patch_id]:
                for picture in (pictures.masked, pictures.output):
                    torch.testing.assert_close(picture[at].double(), view[at[1:]], rtol=0, atol=1e-5)
                continue
            assert (pictures.masked[at] == 0.5).all()
            values = pred[i, patch_id]
            if normalize:
                values = values * math.sqrt(rows[patch_id].var() + 1e-6) + rows[patch_id].mean()
            for y in range(4):
                for x in range(4):
                    for c in range(3):
                        expected = values[(y * 4 + x) * 3 + c] * m.std[c] + m.mean[c]
                        got = pictures.output[i, c, top + y, left + x]
                        assert got.item() == pytest.approx(min(max(expected.item(), 0), 1), abs=1e-5)


# ---- sizes, weight decay's tensors, presets


def test_mae_base_has_111_7_million_parameters():
    with torch.device("meta"):
        method = mae.MAE(model_spec(224, 224, 16, 3, "vit_base"), mae.Config())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    tables = sum(b.numel() for b in method.buffers())
    assert trained == 111_655_680 and round(trained / 1e6, 1) == 111.7
    # mmpretrain counts the fixed position tables, too: 111.91 M.
    assert round((trained + tables) / 1e6, 2) == 111.91
    assert method.decoder.pred.out_features == 768


def test_mae_export_is_the_encoder_alone(small):
    method = build()
    assert set(method.export()) == {n for n, _ in method.encoder.named_parameters()}
    assert all(torch.equal(t, dict(method.encoder.named_parameters())[n]) for n, t in method.export().items())


def test_mae_has_no_ema(small):
    method = build()
    assert method.ema_pairs() == [] and all(p.requires_grad for p in method.parameters())


def test_mae_is_found_by_its_name():
    assert base.find("mae").METHOD is mae.MAE and set(mae.PRESETS) >= {"demo", "paper"}


def test_mae_paper_preset_is_the_published_recipe():
    preset = mae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(method="mae"), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=4096, epochs=800.0, betas=(0.9, 0.95),
        weight_decay=0.05, warmup="40ep", warmup_start=0.0, clip=None, base_lr=1.5e-4, lr=None,
        lr_end=0.0, schedule="cosine",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(2.4e-3, rel=1e-12)
    options = dict(
        mask_ratio=0.75, norm_pix=True, crop_scale=(0.2, 1.0), decoder_width=512, decoder_depth=8, decoder_heads=16
    )
    assert dataclasses.asdict(preset.options) == options
    assert preset.models["vit_huge"] == dict(patch_size=14)
