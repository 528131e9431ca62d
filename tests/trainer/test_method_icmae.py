"""ICMAE against a slow re-computation in float64: every mode of its three losses; values at the start, views, masks."""

import math

import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from icmae_case import MODES, NO_COLOR, SHAPES, TERMS, assert_same_parts, build, make_batch
from method_checks import learn, waves
from slow_icmae import draw_flips, slow_masks, slow_parts
from slow_reference import assert_same_gradients, cut_view, doubles, make_rng, model_spec

from fastmim.config import SIZES, ModelSpec, Size
from fastmim.contrast import join
from fastmim.methods import icmae


@pytest.fixture
def spied_views(monkeypatch):
    """Calls of the view op: (master crops, keyword arguments, result)."""
    calls, real = [], icmae.shift_flip_jitter

    def spy(images, **kwargs):
        view = real(images, **kwargs)
        calls.append((images, kwargs, view))
        return view

    monkeypatch.setattr(icmae, "shift_flip_jitter", spy)
    return calls


# ---- the whole method


@pytest.mark.parametrize("mode", MODES)
def test_icmae_losses_and_gradients_equal_the_slow_recomputation(small, mode):
    """No color, so that the second view is an exact crop."""
    method = build(color=NO_COLOR, **MODES[mode])
    batch, rng = make_batch(method), make_rng()
    flips = draw_flips(rng, batch.ids)
    assert {*flips[0]} == {*flips[1]} == {True, False} and flips[0] != flips[1], "the case must hold all kinds"
    output = method(batch, rng)
    weights = doubles(method)
    slow = slow_parts(method, weights, batch, rng)
    assert_same_parts(output, slow)
    assert not any(t.requires_grad for t in [*output.parts.values(), *output.measures.values()])
    measured = {"position/accuracy": "accuracy", "cosine/positive": "positive", "cosine/mean": "mean"}
    assert output.measures.keys() == {name for name, ours in measured.items() if ours in slow}
    for name, value in output.measures.items():
        assert value.item() == pytest.approx(slow[measured[name]], abs=1e-5), name
    output.loss.backward()
    sum(slow[name] for name in TERMS if name in slow).backward()
    assert_same_gradients(method, weights)


def test_icmae_losses_equal_the_slow_recomputation_with_five_channels(small):
    method = build(SHAPES[1], color=NO_COLOR)
    batch, rng = make_batch(method, 3), make_rng()
    assert_same_parts(method(batch, rng), slow_parts(method, doubles(method), batch, rng))


def test_icmae_second_view_s_jittered_pixels_are_its_target(small, spied_views):
    """Color changes the second view's reconstruction, position and contrast, and nothing of the first view."""
    method, plain = build(), build(color=NO_COLOR)
    batch, rng = make_batch(method), make_rng()
    output = method(batch, rng)
    ((images, kwargs, view),) = spied_views
    assert images is batch.crops[1] and kwargs["flip"].tolist() == draw_flips(rng, batch.ids)[1]
    assert_same_parts(output, slow_parts(method, doubles(method), batch, rng, second=view))
    uncolored = plain(batch, rng)
    assert torch.equal(output.parts["pixel_a"], uncolored.parts["pixel_a"])
    for name in ("pixel_b", "position", "contrast"):
        assert not torch.equal(output.parts[name], uncolored.parts[name])


@pytest.mark.parametrize("mode", ["default", "sd_dec", "pos_drop", "sd_mse", "second_key"])
def test_icmae_losses_in_bf16_are_near(small, mode):
    """With 16 images: the contrast of five is near 0, and 0.03 of it off for some seeds, in plain torch as well."""
    method = build(color=NO_COLOR, **MODES[mode])
    batch, rng = make_batch(method, 16), make_rng()
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch, rng)
    assert output.loss.dtype == torch.float32
    slow = slow_parts(method, doubles(method), batch, rng)
    assert set(output.parts) == {name for name in TERMS if name in slow}
    for name, part in output.parts.items():
        assert part.item() == pytest.approx(slow[name].item(), rel=1e-2), name
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_icmae_contrast_is_computed_in_float32_under_autocast(small, monkeypatch):
    given, real = [], icmae.contrastive_loss
    monkeypatch.setattr(icmae, "contrastive_loss", lambda q, k, **kw: given.append((q, k)) or real(q, k, **kw))
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        method(make_batch(method), make_rng())
    for x in [x for both in given for x in both]:
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    assert len(given) == 2


@pytest.mark.parametrize(
    "options, name, factor",
    [
        (dict(position_weight=0.7), "position", 7.0),
        (dict(position="sd_mse", position_weight=0.25), "position", 0.25),
        (dict(contrast_weight=0.4), "contrast", 4.0),
    ],
)
def test_icmae_weights_scale_their_terms(small, options, name, factor):
    plain = build(**{k: v for k, v in options.items() if not k.endswith("weight")})
    weighted = build(**options)
    batch, rng = make_batch(plain), make_rng()
    one, other = plain(batch, rng), weighted(batch, rng)
    assert other.parts[name].item() == pytest.approx(factor * one.parts[name].item(), rel=1e-6)
    assert other.loss.item() == pytest.approx(sum(v.item() for v in other.parts.values()), rel=1e-6)


def test_icmae_second_view_as_key_reaches_the_contrast_alone(small):
    """Other pixels there change the keys, and nothing else."""
    method = build(second_view="key", color=NO_COLOR)
    batch, rng = make_batch(method), make_rng()
    one, other = method(batch, rng), method(Batch((batch.crops[0], 255 - batch.crops[1]), batch.ids), rng)
    assert list(one.parts) == ["pixel_a", "position", "contrast"]
    assert [torch.equal(one.parts[name], other.parts[name]) for name in one.parts] == [True, True, False]
    plain = build(second_view="key", contrast="none", color=NO_COLOR)
    alone = plain(Batch(batch.crops[:1], batch.ids), rng)
    assert alone.parts.keys() == {"pixel_a", "position"} and torch.equal(alone.parts["pixel_a"], one.parts["pixel_a"])


def test_icmae_second_view_as_key_of_micro_batches_equals_one_batch(small):
    method = build(second_view="key")
    batch, rng = make_batch(method, 6), make_rng()
    whole = method(batch, rng)
    whole.loss.backward()
    expected = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    halves = [Batch(tuple(crops), ids) for *crops, ids in zip(*(x.split(3) for x in (*batch.crops, batch.ids)))]
    with torch.no_grad():
        rests = join([method.represent(half, rng) for half in halves])
    outputs = [method(half, rng, rest) for half, rest in zip(halves, rests, strict=True)]
    for output in outputs:
        (output.loss / 2).backward()
        assert output.parts["contrast"].item() == pytest.approx(whole.parts["contrast"].item(), rel=2e-6)
    assert sum(o.loss.item() for o in outputs) / 2 == pytest.approx(whole.loss.item(), rel=2e-6)
    for name, gradient in expected.items():
        error = (method.get_parameter(name).grad - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-6, name


# ---- values at the start, and what the position gives away


@pytest.mark.parametrize("name", ["vit_base", "vit_tiny"])
def test_icmae_position_starts_at_chance_of_196_places(monkeypatch, name):
    """ln 196 = 5.28 per view, at the widths of the real models; two views at weight 0.1."""
    monkeypatch.setitem(SIZES, name, Size(SIZES[name].width, 1, 12))
    torch.manual_seed(0)
    spec = ModelSpec(name, (56, 56), 4, 3, (0.5,) * 3, (0.25,) * 3)
    method = icmae.ICMAE(spec, icmae.Config(contrast="none"))
    assert spec.num_patches == 196
    output = method(make_batch(method, 4), make_rng())
    assert output.parts["position"].item() / 0.2 == pytest.approx(5.28, abs=0.05)
    assert output.measures["position/accuracy"].item() < 0.05
    mse = icmae.ICMAE(spec, icmae.Config(contrast="none", position="sd_mse"))
    assert mse(make_batch(mse, 4), make_rng()).parts["position"].item() < 2 * 0.06


def trained_position(steps: int, **options) -> float:
    method = build(scrambled=False, contrast="none", color=NO_COLOR, **options)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    for step in range(steps):
        parts = method(make_batch(method, 8, seed=step), make_rng(step=step))
        parts.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parts.parts["position"].item() / 0.2


def test_icmae_position_is_given_away_by_the_position_embedding_and_not_without(small):
    """On noise, nothing else tells where a patch was: below 0.1 after 200 steps, or chance (ln 24 = 3.18)."""
    assert trained_position(200) < 0.1
    assert trained_position(60, pos_drop=1.0) > 3.0


@pytest.mark.parametrize("contrast, share", [("enc_cls", 0.5), ("sd_dec", 0.8)])
def test_icmae_learns_fixed_pictures(monkeypatch, contrast, share):
    """Waves of fixed masks: both reconstructions, the positions and the contrast get better together. At temperature 1,
    which is sd_dec's, contrast cannot fall below 0.4 of where it starts."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    # Four equal channels: sd_dec wants patches of as many values as the encoder is wide.
    method = build((16, 16, 4, 4), scrambled=False, color=NO_COLOR, contrast=contrast)
    pictures = waves(16).expand(-1, 4, -1, -1).contiguous()
    first, *_, last = learn(method, Batch((pictures, pictures), torch.arange(16)), steps=150, peak=3e-3)
    for name in ("pixel_a", "pixel_b"):
        assert last[name] < 0.5 * first[name], name
    assert last["position"] < 0.2 * first["position"] and last["contrast"] < share * first["contrast"]


@pytest.mark.parametrize("contrast, tolerance", [("enc_cls", 0.15), ("sd_dec", 0.05)])
def test_icmae_info_nce_starts_near_ln_n(small, contrast, tolerance):
    method = build(scrambled=False, contrast=contrast, head_hidden=512, head_out=256)
    contrast_part = method(make_batch(method, 64), make_rng()).parts["contrast"].item()
    per_direction = contrast_part / (0.1 * 2 * method.temperature) / 2
    assert per_direction == pytest.approx(math.log(64), abs=tolerance)


@pytest.mark.parametrize("contrast, tau", [("enc_cls", 0.2), ("sd_dec", 1.0)])
def test_icmae_info_nce_of_indistinguishable_vectors_is_ln_n(small, contrast, tau):
    """Both directions, factor 2 x temperature, weight 0.1."""
    method = build(contrast=contrast)
    with torch.no_grad():
        method.predictor[0].weight.zero_()
        method.predictor[3].weight.zero_()
    value = method(make_batch(method, 6), make_rng()).parts["contrast"].item()
    assert value == pytest.approx(0.1 * 2 * tau * 2 * math.log(6), rel=1e-5)


# ---- views and masks


def test_icmae_asks_for_two_crops_of_their_own_with_boxes():
    def crops(**options):
        with torch.device("meta"):
            return icmae.ICMAE(model_spec(32, 48, 8, 3, "vit_pico"), icmae.Config(**options))

    method = crops()
    expected = [CropSpec((32, 48), (0.2, 1.0), view=v, alpha=0.1, uses_boxes=True) for v in (0, 1)]
    assert list(method.crops) == expected
    assert method.box_updates == (0.2, 0.4, 0.6, 0.8) and method.first_box == (0.25, 0.25, 0.75, 0.75)
    method = crops(first_crop="random", crop_alpha=0.6, box_updates=(0.5,))
    assert method.crops[0].alpha == 0.6 and method.box_updates == (0.5,) and method.first_box is None
    method = crops(crop="sim_center")
    assert method.crops == tuple(expected) and method.box_updates == () and method.first_box == (0.25, 0.25, 0.75, 0.75)
    assert crops(second_view="key").crops == tuple(expected)
    assert crops(second_view="key", contrast="none").crops == tuple(expected[:1])
    method = crops(crop="random")
    assert [c.uses_boxes for c in method.crops] == [False, False] and method.box_updates == ()
    assert method.first_box is None and [c.view for c in method.crops] == [0, 1]


@pytest.mark.parametrize("share", ["same", "independent", "complement"])
def test_icmae_masks_of_the_views(small, share):
    method = build((56, 56, 4, 3), mask_share=share)
    ids, rng = torch.arange(40), make_rng()
    plans = method._plans(rng, ids)
    visible = slow_masks(method, rng, ids, kept=49)
    for plan, expected in zip(plans, visible):
        assert plan.ids_keep.tolist() == expected
        drawn = torch.cat([plan.ids_keep, plan.ids_masked], 1)
        assert torch.equal(drawn.gather(1, plan.ids_restore), torch.arange(196).expand(40, -1))
        assert torch.equal(plan.mask.sum(1), torch.full((40,), 147.0))
        assert plan.mask.gather(1, plan.ids_keep).sum() == 0
    shared = [len({*a} & {*b}) for a, b in zip(*visible)]
    if share == "independent":
        assert sum(shared) / 40 == pytest.approx(49 * 49 / 196, abs=1.5)
    else:
        assert set(shared) == {49 if share == "same" else 0}


def test_icmae_flips_of_the_views_are_drawn_apart(small, spied_views):
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method, 40), make_rng()
    method(batch, rng)
    first, second = draw_flips(rng, batch.ids)
    agree = sum(a == b for a, b in zip(first, second))
    assert 8 < agree < 32 and 8 < sum(first) < 32 and 8 < sum(second) < 32
    (_, _, view), m = spied_views[0], method.model
    for i in range(40):
        exact = cut_view(batch.crops[1][i], m.image_size, 0, 0, second[i], (0,) * 3, (1,) * 3)
        torch.testing.assert_close(view[i].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(contrast="enc_cls"), dict(heat="feat"), dict(crop="random")])
def test_icmae_says_where_boxes_come_from_an_idle_class_token(small, changes):
    method = build(**(dict(contrast="none", crop="contrastive", heat="attn") | changes))
    assert ["--icmae.heat feat" in note for note in method.notes] == ([] if changes else [True])
