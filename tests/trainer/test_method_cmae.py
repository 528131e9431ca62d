"""CMAE against a slow re-computation in float64: both losses, masks and views."""

import math

import pytest
import torch
from cmae_case import NO_COLOR, SHAPES, SIZES_OF_CASE, TAU, build
from fastmim_pipelines.spec import Batch, CropSpec
from method_checks import assert_repeats, others_of
from slow_reference import (
    assert_same_gradients,
    cells_to_patches,
    cmae_vectors,
    cut_view,
    doubles,
    draw_flips,
    draw_shifts,
    draw_visible,
    info_nce,
    make_batch,
    make_rng,
)

from fastmim.config import ConfigError
from fastmim.methods import cmae
from fastmim.views import ColorConfig

IDS = ["x".join(map(str, shape)) for shape in SHAPES]


def slow_terms(method, weights, batch, rng, target_views=None):
    """(pixel, contrast) as they enter the loss with weights 1."""
    pixel, queries, keys = cmae_vectors(method, weights, batch, rng, target_views=target_views, **SIZES_OF_CASE)
    return pixel, 2 * TAU * info_nce(queries, keys, list(range(len(queries))), TAU)


@pytest.fixture
def spied_views(monkeypatch):
    """Calls of the view op made by CMAE: (master crops, keyword arguments, result)."""
    calls, real = [], cmae.shift_flip_jitter

    def spy(images, **kwargs):
        view = real(images, **kwargs)
        calls.append((images, kwargs, view))
        return view

    monkeypatch.setattr(cmae, "shift_flip_jitter", spy)
    return calls


# ---- the whole method


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_cmae_losses_and_gradients_equal_the_slow_recomputation(small, shape):
    """No color, so that the target view is an exact crop of the mirrored master crop."""
    method = build(shape, color=NO_COLOR)
    batch, rng = make_batch(method, 5), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    output = method(batch, rng)
    weights = doubles(method)
    pixel, contrast = slow_terms(method, weights, batch, rng)
    assert output.parts["pixel"].item() == pytest.approx(pixel.item(), rel=1e-5)
    assert output.parts["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((pixel + contrast).item(), rel=1e-5)
    assert not any(t.requires_grad for t in [*output.parts.values(), *output.measures.values()])
    output.loss.backward()
    (pixel + contrast).backward()
    assert_same_gradients(method, weights)


def test_cmae_losses_with_color_equal_the_slow_recomputation_on_the_op_s_view(small, spied_views):
    method = build()
    batch, rng = make_batch(method, 5), make_rng()
    output = method(batch, rng)
    ((_, _, view),) = spied_views
    pixel, contrast = slow_terms(method, doubles(method), batch, rng, target_views=list(view.double()))
    assert output.parts["pixel"].item() == pytest.approx(pixel.item(), rel=1e-5)
    assert output.parts["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    plain = slow_terms(method, doubles(method), batch, rng)[1]
    assert abs(plain - contrast) > 1e-3 * contrast, "the case can tell color from none"


def test_cmae_weights_scale_the_two_terms(small):
    plain, weighted = build(color=NO_COLOR), build(color=NO_COLOR, contrast_weight=3.0, pixel_weight=0.5)
    batch, rng = make_batch(plain), make_rng()
    one, other = plain(batch, rng), weighted(batch, rng)
    assert other.parts["pixel"].item() == pytest.approx(0.5 * one.parts["pixel"].item(), rel=1e-6)
    assert other.parts["contrast"].item() == pytest.approx(3 * one.parts["contrast"].item(), rel=1e-6)
    assert other.loss.item() == pytest.approx(sum(v.item() for v in other.parts.values()), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_cmae_contrast_carries_twice_the_temperature(small, temperature):
    method = build(color=NO_COLOR, temperature=temperature)
    batch, rng = make_batch(method), make_rng()
    _, queries, keys = cmae_vectors(method, doubles(method), batch, rng, **SIZES_OF_CASE)
    slow = 2 * temperature * info_nce(queries, keys, [0, 1, 2, 3], temperature)
    assert method(batch, rng).parts["contrast"].item() == pytest.approx(slow.item(), rel=1e-5)


def test_cmae_contrast_of_indistinguishable_vectors_is_014_ln_b(small):
    """All keys alike: chance, 2 tau ln B."""
    method = build(color=NO_COLOR)
    with torch.no_grad():
        method.target_projector[1].weight.zero_()
    contrast = method(make_batch(method, 6), make_rng()).parts["contrast"].item()
    assert contrast == pytest.approx(0.14 * math.log(6), rel=1e-5)


# ---- masks


def test_cmae_masks_17_of_49_cells_at_224(small):
    method = build((224, 224, 16, 3), color=NO_COLOR)
    ids, rng = torch.arange(12), make_rng()
    plan = method.mask(rng, ids)
    assert plan.ids_keep.shape == (12, 68) and plan.ids_masked.shape == (12, 128)
    assert torch.equal(plan.mask.sum(1), torch.full((12,), 128.0))
    cells = draw_visible(rng, ids, 49, 17)
    for row, keep, kept_cells in zip(plan.mask, plan.ids_keep, cells):
        visible = cells_to_patches(kept_cells, (14, 14), 2)
        assert sorted(keep.tolist()) == visible
        assert [i for i in range(196) if row[i] == 0] == visible
    drawn = torch.cat([plan.ids_keep, plan.ids_masked], 1)
    assert torch.equal(drawn.gather(1, plan.ids_restore), torch.arange(196).expand(12, -1))


@pytest.mark.parametrize("ratio, visible", [(0.65, 68), (0.75, 48), (0.5, 96)])
def test_cmae_mask_ratio_counts_cells(small, ratio, visible):
    method = build((224, 224, 16, 3), mask_ratio=ratio)
    assert method.mask(make_rng(), torch.arange(2)).ids_keep.shape == (2, visible)


def test_cmae_mask_cell_must_divide_the_grid(small):
    with pytest.raises(ConfigError, match="mask cell"):
        build((12, 20, 4, 3))
    assert build((12, 20, 4, 3), mask_cell=1).mask(make_rng(), torch.arange(2)).ids_keep.shape == (2, 5)


# ---- views


@pytest.mark.parametrize(
    "shape, size, shift", [((224, 224, 16, 3), 256, 31), ((64, 64, 8, 3), 80, 15), ((224, 224, 14, 3), 252, 27)]
)
def test_cmae_master_crop_and_default_shift_follow_the_patch(small, shape, size, shift):
    method = build(shape)
    assert method.shift == shift == 2 * shape[2] - 1
    assert method.crops == (CropSpec(size=(size, size), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),)


def test_cmae_online_view_is_the_top_left_corner_of_the_mirrored_crop(small, spied_views):
    """Noise outside of the corner window leaves the pixel loss as it is; noise inside does not."""
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method, 6), make_rng()
    pixel = method(batch, rng).parts["pixel"]
    crops = batch.crops[0].clone()
    noise = torch.randint(0, 256, crops.shape, dtype=torch.uint8)
    h, w = method.model.image_size
    for crop, other, flip in zip(crops, noise, draw_flips(rng, batch.ids)):
        corner = slice(crop.shape[2] - w, None) if flip else slice(0, w)
        kept = crop[:, :h, corner].clone()
        crop.copy_(other)
        crop[:, :h, corner] = kept
    outside = Batch((crops,), batch.ids)
    assert torch.equal(method(outside, rng).parts["pixel"], pixel)
    assert not torch.equal(method(Batch((noise,), batch.ids), rng).parts["pixel"], pixel)


def test_cmae_target_view_is_shifted_and_shares_the_flip(small, spied_views):
    method = build(color=NO_COLOR)
    batch, rng = make_batch(method, 40), make_rng()
    method(batch, rng)
    ((images, kwargs, view),) = spied_views
    assert images is batch.crops[0]
    m = method.model
    shifts, flips = draw_shifts(rng, batch.ids, 7), draw_flips(rng, batch.ids)
    assert kwargs["offset"].tolist() == [list(shift) for shift in shifts]
    assert kwargs["flip"].tolist() == flips
    for i in range(40):
        exact = cut_view(images[i], m.image_size, *shifts[i], flips[i], m.mean, m.std)
        torch.testing.assert_close(view[i].double(), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shift, largest", [(None, 31), (5, 5), (0, 0)])
def test_cmae_target_shift_reaches_0_and_the_largest(small, spied_views, shift, largest):
    """One row of 2 x 2 patches of 16 pixels, many ids; the encoder is left out."""
    method = build((32, 32, 16, 1), shift=shift, mask_cell=1)
    method.target_encoder = torch.nn.Identity()
    batch = Batch((torch.zeros(600, 1, *method.crops[0].size, dtype=torch.uint8),), torch.arange(600))
    method._target(batch, make_rng(), dict(size=(32, 32)))
    offset = spied_views[0][1]["offset"]
    for axis in offset.T:
        assert sorted(axis.unique().tolist()) == list(range(largest + 1))


def test_cmae_target_view_gets_color_and_the_target_s_pixels_do_not(small, spied_views):
    """The reconstruction target is the plain online view: color changes the contrastive term alone."""
    plain, colored = build(color=NO_COLOR), build(color=ColorConfig(jitter_probability=1.0, grey_probability=1.0))
    batch, rng = make_batch(plain), make_rng()
    one, other = plain(batch, rng), colored(batch, rng)
    assert torch.equal(one.parts["pixel"], other.parts["pixel"])
    assert not torch.equal(one.parts["contrast"], other.parts["contrast"])
    view = spied_views[1][2].double()
    m = plain.model
    channels = [view[:, c] * m.std[c] + m.mean[c] for c in range(3)]
    torch.testing.assert_close(channels[0], channels[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(channels[0], channels[2], rtol=0, atol=1e-5)


# ---- side effects, repetition, precision


def test_cmae_repeats_bit_for_bit_and_changes_with_step_and_seed(small, spied_views):
    method = build()
    batch, rng = make_batch(method), make_rng()
    assert_repeats(method, batch, rng)
    (first, _, *others), keep = [call[1]["offset"] for call in spied_views], method.mask(rng, batch.ids).ids_keep
    assert len(others) == 3 and not any(torch.equal(offset, first) for offset in others)
    for other, at in others_of(batch, rng):
        assert not torch.equal(method.mask(at, other.ids).ids_keep, keep)
