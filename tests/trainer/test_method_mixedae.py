"""MixedAE against a slow re-computation in float64: both losses, every option, groups, accuracy, pictures, presets."""

import dataclasses
import math

import pytest
import torch
from fastmim_kernels import Stream, random_words
from fastmim_pipelines.spec import Batch, CropSpec
from slow_reference import (
    SMALL,
    assert_same_gradients,
    block,
    count_blocks,
    cut_view,
    doubles,
    draw_flips,
    layer_norm,
    linear,
    make_batch,
    make_rng,
    model_spec,
    patch_rows,
    pixel_loss,
    position_table,
    scramble,
    under,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.config import SIZES, ConfigError, Size, TrainConfig
from fastmim.methods import base, mixedae

# (height, width, patch, channels): 24 patches but for the last
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
DECODER = dict(decoder_width=32, decoder_depth=2, decoder_heads=4)
NAIVE = dict(homologous="none", use_segments=False, contrast_weight=0.0)
# The ablation's rows first.
GRID = {
    "naive": NAIVE,
    "segments": NAIVE | dict(use_segments=True),
    "topk": NAIVE | dict(homologous="topk"),
    "topk_segments": dict(contrast_weight=0.0),
    "all": {},
    "oracle": NAIVE | dict(homologous="oracle"),
    "oracle_all": dict(homologous="oracle"),
    "no_class_token": dict(cls_mode="none"),
    "oracle_no_class_token": dict(homologous="oracle", cls_mode="none"),
    "naive_no_class_token": NAIVE | dict(cls_mode="none"),
    "full": dict(mode="full", members=3),
    "unequal_shares": dict(members=5),
    "unequal_shares_full": dict(members=5, mode="full"),
    "pixels": dict(norm_pix=False, members=2),
    "mlp": dict(projection="mlp", contrast_weight=0.3, temperature=0.1),
    "all_but_first": dict(homo_layers="all_but_first"),
    "last_1": dict(homo_layers=1, topk=3),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(*SMALL))


def build(shape=SHAPES[0], seed=0, **options):
    torch.manual_seed(seed)
    method = mixedae.MixedAE(model_spec(*shape), mixedae.Config(**(DECODER | options)))
    scramble(method, seed)
    return method


def groups_of(method, count=2, seed=0):
    return make_batch(method, count * method.config.members, seed=seed)


# ---- the method once more, slowly


def draw_sources(rng, ids, patches, members):
    """Per group the member of each position: positions in the order of their words are dealt out one by one."""
    rows = []
    for words in random_words(rng, ids[::members], Stream.MIX, patches).tolist():
        row = [None] * patches
        for place, position in enumerate(sorted(range(patches), key=lambda p: (words[p], p))):
            row[position] = place % members
        rows.append(row)
    return rows


def allowed_keys(scores, row, kind, topk, has_cls):
    """Per query the keys that it may attend to, of the tokens of one mixture; scores as nested lists."""
    first = 1 if has_cls else 0
    keys = []
    for i, values in enumerate(scores):
        patches = list(range(first, len(values)))
        if i >= first and kind == "topk":
            least = sorted((values[j] for j in patches), reverse=True)[topk - 1]
            patches = [j for j in patches if values[j] >= least]
        if i >= first and kind == "oracle":
            patches = [j for j in patches if row[j - first] == row[i - first]]
        keys.append(list(range(first)) + patches)
    return keys


def mixed_block(w, x, heads, row, kind, topk, has_cls, accuracies):
    """Pre-norm block on the tokens (N, D) of one mixture."""
    width = x.shape[1]
    d = width // heads
    qkv = linear(w, "attn.qkv", layer_norm(w, "norm1", x))
    outputs = []
    for h in range(heads):
        q, k, v = (qkv[:, third * width + h * d : third * width + (h + 1) * d] for third in range(3))
        scores = q @ k.T / math.sqrt(d)
        keys = allowed_keys(scores.tolist(), row, kind, topk, has_cls)
        rows = []
        for i, chosen in enumerate(keys):
            weights = torch.exp(scores[i, chosen])
            rows.append((weights / weights.sum()) @ v[chosen])
        outputs.append(torch.stack(rows))
        first = 1 if has_cls else 0
        for i in range(first, len(keys)):
            right = [j for j in keys[i] if j >= first and row[j - first] == row[i - first]]
            accuracies.append(len(right) / topk)
    x = x + linear(w, "attn.proj", torch.cat(outputs, 1))
    hidden = linear(w, "fc1", layer_norm(w, "norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(w, "fc2", hidden)


def slow_encode(method, weights, views, row, kinds, topk, has_cls):
    """Tokens of one mixture (class token first, if there is one), and each layer's list of accuracies."""
    m, w = method.model, under(weights, "encoder")
    embedded = [linear(w, "patch_embed", patch_rows(view, m.patch_size)) for view in views]
    table = position_table(embedded[0].shape[1], m.grid, "column")
    tokens = [w["cls_token"][0, 0] + table[0]] if has_cls else []
    for position, member in enumerate(row):
        token = embedded[member][position] + table[1 + position]
        tokens.append(token + weights["segments.weight"][member] if "segments.weight" in weights else token)
    x, accuracies = torch.stack(tokens), []
    for i, kind in enumerate(kinds):
        accuracies.append([])
        x = mixed_block(under(w, f"blocks.{i}"), x, SMALL[2], row, kind, topk, has_cls, accuracies[-1])
    return layer_norm(w, "norm", x), accuracies


def slow_decode(method, weights, latent, row, member, has_cls):
    """(L, values) of one image from the tokens of its mixture."""
    w = under(weights, "decoder")
    embedded = linear(w, "embed", latent)
    table = position_table(embedded.shape[1], method.model.grid, "column")
    tokens = [embedded[0] + table[0]] if has_cls else []
    first = len(tokens)
    for position, owner in enumerate(row):
        token = embedded[first + position] if owner == member else w["mask_token"][0, 0]
        tokens.append(token + table[1 + position])
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, DECODER["decoder_heads"])
    return linear(w, "pred", layer_norm(w, "norm", x))[first:]


def slow_contrast(features, row, temperature):
    """Sum of the patches' terms in one mixture."""
    u = features / torch.sqrt((features**2).sum(1, keepdim=True))
    s = u @ u.T / temperature
    total = 0
    for i in range(len(row)):
        partners = [p for p in range(len(row)) if p != i and row[p] == row[i]]
        others = torch.log(sum(torch.exp(s[i, a]) for a in range(len(row)) if a != i))
        total = total - sum(s[i, p] - others for p in partners) / len(partners)
    return total


def slow_terms(method, weights, batch, rng):
    """(pixel loss, contrastive loss without its weight, accuracy per layer) from the options alone."""
    c, m = method.config, method.model
    patches, members, depth = m.num_patches, c.members, SMALL[1]
    topk = patches // members if c.topk is None else c.topk
    first = {"all": 0, "all_but_first": 1}.get(c.homo_layers, depth - 1)
    kinds = [c.homologous if i >= first else "none" for i in range(depth)]
    flips = draw_flips(rng, batch.ids)
    views = [cut_view(x, m.image_size, 0, 0, f, m.mean, m.std) for x, f in zip(batch.crops[0], flips)]
    has_cls = c.cls_mode == "shared"
    pixels, contrasts, accuracies = [], [], [[] for _ in range(depth)]
    for turn in range(members if c.mode == "full" else 1):
        preds, hidden, contrast, count = [], [], 0, 0
        for g, drawn in enumerate(draw_sources(rng, batch.ids, patches, members)):
            row = [(member + turn) % members for member in drawn]
            own = views[g * members : (g + 1) * members]
            latent, layers = slow_encode(method, weights, own, row, kinds, topk, has_cls)
            for found, more in zip(accuracies, layers):
                found += more
            for member in range(members):
                preds.append(slow_decode(method, weights, latent, row, member, has_cls))
                hidden.append([p for p in range(patches) if row[p] != member])
            features = latent[1:] if has_cls else latent
            if c.projection == "mlp" and "projector.0.weight" in weights:
                x = linear(weights, "projector.0", features)
                features = linear(weights, "projector.2", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
            contrast = contrast + slow_contrast(features, row, c.temperature)
            count += patches
        pixels.append(pixel_loss(preds, views, hidden, m.patch_size, c.norm_pix))
        contrasts.append(contrast / count)
    used = {i: sum(a) / len(a) for i, a in enumerate(accuracies) if kinds[i] == "topk"}
    return sum(pixels) / len(pixels), sum(contrasts) / len(contrasts), used


def assert_equals_slow(method, batch, rng):
    output = method(batch, rng)
    weights = doubles(method)
    pixel, contrast, accuracies = slow_terms(method, weights, batch, rng)
    weight = method.config.contrast_weight
    slow = pixel + weight * contrast
    assert output.loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert output.parts["pixel"].item() == pytest.approx(pixel.item(), rel=1e-5)
    assert set(output.parts) == ({"pixel", "contrast"} if weight else {"pixel"})
    if weight:
        assert output.parts["contrast"].item() == pytest.approx(weight * contrast.item(), rel=1e-5)
    assert set(output.measures) == {f"topk_accuracy/{i:02d}" for i in accuracies}
    for i, accuracy in accuracies.items():
        assert output.measures[f"topk_accuracy/{i:02d}"].item() == pytest.approx(accuracy, rel=1e-5)
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


def test_mixedae_images_meet_nowhere_with_oracle_and_no_class_token(small):
    """Other images of the mixture may change as they like; with a shared class token or top-K they do not stay out."""
    for options, is_apart in (
        (dict(homologous="oracle", cls_mode="none"), True),
        (dict(homologous="oracle"), False),
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
    "options", [{}, dict(mode="full"), dict(homologous="oracle")], ids=["compose", "full", "oracle"]
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


# ---- randomness, side effects, processes


def test_mixedae_repeats_bit_for_bit_and_changes_with_step_seed_and_ids(small):
    method = build()
    batch, rng = groups_of(method), make_rng()
    loss = method(batch, rng).loss
    torch.manual_seed(99)
    assert torch.equal(method(batch, rng).loss, loss)
    src = method._sources(batch.ids, rng)
    for other, other_rng in [
        (batch, make_rng(step=12)),
        (batch, make_rng(seed=4)),
        (Batch(batch.crops, batch.ids + 1), rng),
    ]:
        assert not torch.equal(method(other, other_rng).loss, loss)
        assert not torch.equal(method._sources(other.ids, other_rng), src)


@pytest.mark.parametrize("options", [{}, dict(mode="full", members=3)], ids=["compose", "full"])
def test_mixedae_ranks_and_micro_batches_of_whole_groups_average_to_the_full_batch(small, options):
    method = build(**options)
    members = method.config.members
    batch, rng = groups_of(method, 3), make_rng()
    full = method(batch, rng).loss
    full.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters()}
    method.zero_grad()
    losses = []
    for i in range(0, 3 * members, members):
        part = slice(i, i + members)
        loss = method(Batch((batch.crops[0][part],), batch.ids[part]), rng).loss
        (loss / 3).backward()
        losses.append(loss.item())
    assert sum(losses) / 3 == pytest.approx(full.item(), rel=1e-6)
    for name, parameter in method.named_parameters():
        error = (parameter.grad - gradients[name]).norm()
        assert error <= 1e-4 * gradients[name].norm() + 1e-6, name


def test_mixedae_forward_has_no_side_effects(small):
    method = build()
    batch, rng = groups_of(method), make_rng()
    state = {n: t.clone() for n, t in [*method.named_parameters(), *method.named_buffers()]}
    crop, generator = batch.crops[0].clone(), torch.get_rng_state()
    method(batch, rng).loss.backward()
    assert all(torch.equal(t, state[n]) for n, t in [*method.named_parameters(), *method.named_buffers()])
    assert torch.equal(batch.crops[0], crop) and torch.equal(rng, make_rng())
    assert torch.equal(torch.get_rng_state(), generator), "nothing random but what rng and ids give"


class NoHostReads(TorchDispatchMode):
    """Raises where the host would wait for the device: a number read, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["all", "full", "oracle_no_class_token", "unequal_shares_full", "mlp"])
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
    chance, log(15) = 2.71, towards its floor, log(7) = 1.95, and the last block finds its own image better than by chance.
    """
    steps, peak = 250, 2e-3
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    config = mixedae.Config(members=2, contrast_weight=1.0, decoder_width=64, decoder_depth=1, decoder_heads=4)
    method = mixedae.MixedAE(model_spec(16, 16, 4, 1), config)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    a, b, c = torch.rand(3, 32, 1, 1, 1)
    waves = 127 + 120 * torch.sin(0.5 * a * x + 0.5 * b * y + 6 * c)
    batch = Batch((waves.to(torch.uint8),), torch.arange(32))
    optimizer = torch.optim.AdamW(method.parameters(), lr=peak, betas=(0.9, 0.95))
    outputs = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / 20) * (1 - step / steps)
        output = method(batch, make_rng(step=0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        outputs.append(output)
    first, last = outputs[0], outputs[-1]
    assert first.parts["pixel"] > 0.9 and last.parts["pixel"] < 0.3
    assert first.parts["contrast"] > 2.7 and math.log(7) < last.parts["contrast"] < 2.3
    assert first.measures["topk_accuracy/01"] < 0.52 and last.measures["topk_accuracy/01"] > 0.6


# ---- pictures


@pytest.mark.parametrize("options", [dict(members=2), dict(members=5, mode="full"), dict(cls_mode="none")], ids=str)
def test_mixedae_pictures_show_view_own_patches_and_prediction(small, options):
    method = build(norm_pix=False, **options)
    members = method.config.members
    batch, rng = groups_of(method), make_rng()
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    src = method._sources(batch.ids, rng)
    latent, _ = method._encode(batch.crops[0], src)
    m = method.model
    pred = method.decoder(latent[:, 1 - method.num_prefix :], src).double()
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


def test_mixedae_spares_vectors_tokens_and_segments_from_weight_decay(small):
    method = build(projection="mlp")
    spared = {n for n, p in method.named_parameters() if method.no_decay(n, p)}
    decayed = {n for n, _ in method.named_parameters()} - spared
    assert {"encoder.cls_token", "decoder.mask_token", "segments.weight", "encoder.norm.weight"} <= spared
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert {"projector.0.weight", "encoder.patch_embed.weight", "decoder.blocks.1.fc2.weight"} <= decayed
    assert spared - {n for n, p in method.named_parameters() if p.ndim == 1} == {
        "encoder.cls_token", "decoder.mask_token", "segments.weight",
    }  # fmt: skip


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
        use_segments=True, contrast_weight=0.1, temperature=0.25, projection="none", norm_pix=True,
        crop_scale=(0.2, 1.0), decoder_width=512, decoder_depth=8, decoder_heads=16,
    )  # fmt: skip
    assert dataclasses.asdict(preset.options) == options
