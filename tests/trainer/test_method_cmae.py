"""CMAE against a slow re-computation from specs/cmae.md: both losses, both branches, two processes, presets."""

import dataclasses
import math

import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from slow_reference import (
    SMALL,
    assert_same_gradients,
    cells_to_patches,
    cmae_vectors,
    cut_view,
    doubles,
    draw_flips,
    draw_shifts,
    draw_visible,
    encode,
    info_nce,
    make_batch,
    make_rng,
    model_spec,
    position_table,
    scramble,
    small_cmae,
    two_rank_results,
    under,
)

from fastmim.config import SIZES, ConfigError, Size, TrainConfig
from fastmim.methods import base, cmae
from fastmim.views import ColorConfig

# (height, width, patch, channels)
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
NO_COLOR = ColorConfig(0.0, 0.0, 0.0, 0.0, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)
SMALL_OPTIONS = dict(
    pixel_decoder_depth=2, feature_decoder_depth=1, decoder_width=32, decoder_heads=4, head_hidden=40, head_out=16,
)  # fmt: skip
# floor(6 x .35) of the six 2 x 2 cells of a grid of 4 x 6 patches.
SIZES_OF_CASE = dict(cell=2, kept_cells=2, heads=SMALL[2], decoder_heads=4)
TAU = 0.07


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(*SMALL))


def build(shape=SHAPES[0], seed=0, **options):
    torch.manual_seed(seed)
    method = cmae.CMAE(model_spec(*shape), cmae.Config(**(SMALL_OPTIONS | options)))
    scramble(method, seed)
    return method


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
    batch, rng = make_batch(method), make_rng()
    state = {n: t.clone() for n, t in [*method.named_parameters(), *method.named_buffers()]}
    crop, generator = batch.crops[0].clone(), torch.get_rng_state()
    method(batch, rng).loss.backward()
    assert all(torch.equal(t, state[n]) for n, t in [*method.named_parameters(), *method.named_buffers()])
    assert torch.equal(batch.crops[0], crop) and torch.equal(rng, make_rng())
    assert torch.equal(torch.get_rng_state(), generator), "nothing random but what rng and ids give"


def test_cmae_repeats_bit_for_bit_and_changes_with_step_and_seed(small, spied_views):
    method = build()
    batch, rng = make_batch(method), make_rng()
    first = method(batch, rng)
    torch.manual_seed(99)
    again = method(batch, rng)
    assert torch.equal(first.loss, again.loss) and all(torch.equal(first.parts[n], again.parts[n]) for n in first.parts)
    keep = method.mask(rng, batch.ids).ids_keep
    for other in (make_rng(step=12), make_rng(seed=4)):
        assert not torch.equal(method(batch, other).loss, first.loss)
        assert not torch.equal(method.mask(other, batch.ids).ids_keep, keep)
        assert not torch.equal(spied_views[-1][1]["offset"], spied_views[0][1]["offset"])


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
