"""The ConvMAE encoder against the published, dense formulation: whole maps, and a mask before each depthwise step."""

import dataclasses
import math

import pytest
import torch
from cmae_case import NO_COLOR, TAU
from slow_reference import (
    assert_same_gradients,
    block,
    count_blocks,
    cut_view,
    doubles,
    draw_flips,
    draw_shifts,
    draw_visible,
    head,
    info_nce,
    layer_norm,
    make_batch,
    make_rng,
    model_spec,
    pixel_loss,
    position_table,
    scramble,
    under,
)
from torch.nn import functional as F

from fastmim.config import SIZES, ConfigError, Size
from fastmim.conv import ConvEncoder, stage_widths
from fastmim.methods import base, cmae, mae

HEADS = 3
SHAPES = [(16, 24, 4, 3), (24, 16, 8, 1), (36, 24, 12, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(48, 3, HEADS))


def spec(shape=SHAPES[0]):
    return dataclasses.replace(model_spec(*shape), stem="conv")


# ---- the published encoder, one image at a time, in float64


def as_convolution(weight, side, channels):
    """(D, side * side * C), values by row, column, channel -> (D, C, side, side)."""
    return weight.reshape(len(weight), side, side, channels).permute(0, 3, 1, 2)


def strided(w, name, maps, side):
    kernel = as_convolution(w[f"{name}.linear.weight"], side, maps.shape[0])
    return F.conv2d(maps[None], kernel, w[f"{name}.linear.bias"], stride=side)[0]


def channel_norm(w, name, maps):
    mean = maps.mean(0)
    variance = ((maps - mean) ** 2).mean(0)
    unit = (maps - mean) / torch.sqrt(variance + 1e-5)
    return unit * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def pointwise(w, name, maps):
    return F.conv2d(maps[None], w[f"{name}.weight"][:, :, None, None], w[f"{name}.bias"])[0]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def conv_block(w, maps, mask):
    """mask: 1 where a pixel of the stage belongs to a visible patch."""
    hidden = pointwise(w, "conv1", channel_norm(w, "norm1", maps)) * mask
    kernel = w["spread.weight"]
    hidden = F.conv2d(hidden[None], kernel, w["spread.bias"], padding=2, groups=len(kernel))[0]
    maps = maps + pointwise(w, "conv2", hidden)
    return maps + pointwise(w, "fc2", gelu(pointwise(w, "fc1", channel_norm(w, "norm2", maps))))


def conv_encode(w, view, visible, *, patch, heads, first, final_norm):
    """(K, D): the tokens of the visible patches."""
    grid = view.shape[1] // patch, view.shape[2] // patch
    mask = torch.zeros(grid, dtype=torch.float64)
    for i in visible:
        mask[i // grid[1], i % grid[1]] = 1
    fine, coarse = (mask.repeat_interleave(n, 0).repeat_interleave(n, 1) for n in (4, 2))
    x = gelu(channel_norm(w, "norm1", strided(w, "embed1", view, patch // 4)))
    for i in range(2):
        x = conv_block(under(w, f"stage1.{i}"), x, fine)
    skip = strided(w, "skip1", x, 4)
    x = gelu(channel_norm(w, "norm2", strided(w, "embed2", x, 2)))
    for i in range(2):
        x = conv_block(under(w, f"stage2.{i}"), x, coarse)
    skip = skip + strided(w, "skip2", x, 2)
    x = gelu(channel_norm(w, "norm3", strided(w, "embed3", x, 2)))
    tokens = x.flatten(1).T @ w["project.weight"].T + w["project.bias"]
    table = position_table(tokens.shape[1], grid, first)[1:]
    tokens, skip = (tokens + table)[visible], skip.flatten(1).T[visible]
    for i in range(count_blocks(w)):
        tokens = block(under(w, f"blocks.{i}"), tokens, heads)
    tokens = tokens + skip
    return layer_norm(w, "norm", tokens) if final_norm else tokens


def patches_of(view, patch):
    channels, height, width = view.shape
    rows = view.view(channels, height // patch, patch, width // patch, patch).permute(1, 3, 2, 4, 0)
    return rows.reshape(-1, patch * patch * channels)


# ---- the encoder


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_conv_encoder_is_the_dense_masked_one_on_visible_patches(shape, final_norm):
    torch.manual_seed(1)
    encoder = ConvEncoder(spec(shape), final_norm=final_norm, position="row").double()
    encoder.position = position_table(48, encoder.model.grid, "row")[1:]
    scramble(encoder)
    weights = doubles(encoder)
    views = torch.randn(3, shape[3], *shape[:2], dtype=torch.float64)
    count = encoder.model.num_patches
    kept = [torch.randperm(count)[: max(1, count // 2)] for _ in views]
    got = encoder(torch.stack([patches_of(v, shape[2])[ids] for v, ids in zip(views, kept)]), torch.stack(kept))
    sizes = dict(patch=shape[2], heads=HEADS, first="row", final_norm=final_norm)
    want = torch.stack([conv_encode(weights, v, ids.tolist(), **sizes) for v, ids in zip(views, kept)])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-8)


def test_conv_encoder_without_ids_takes_all_patches_in_order():
    torch.manual_seed(1)
    encoder = ConvEncoder(spec()).double()
    count = encoder.model.num_patches
    patches = torch.randn(2, count, encoder.model.patch_values, dtype=torch.float64)
    everything = torch.arange(count).expand(2, -1)
    torch.testing.assert_close(encoder(patches), encoder(patches, everything), rtol=1e-12, atol=1e-12)


def test_conv_encoder_starts_as_the_source_does():
    torch.manual_seed(0)
    encoder = ConvEncoder(spec())
    first, second = stage_widths("vit_tiny")
    xavier = {"embed3.linear": (4 * second, 48), "project": (48, 48), "blocks.0.fc1": (48, 192)}
    default = {"embed1.linear": 3, "embed2.linear": 4 * first, "stage1.0.fc1": first, "skip1.linear": 16 * first}
    for name, (fan_in, fan_out) in xavier.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        top = encoder.get_parameter(f"{name}.weight").abs().max()
        assert 0.98 * bound < top <= bound, name
    for name, fan_in in default.items():
        top = encoder.get_parameter(f"{name}.weight").abs().max()
        assert 0.9 / math.sqrt(fan_in) < top <= 1 / math.sqrt(fan_in), name
    assert len(encoder.blocks) == 2, "one block less than the plain encoder"
    assert (stage_widths("vit_base"), stage_widths("vit_large")) == ((256, 384), (384, 768))


# ---- in the methods


@pytest.mark.parametrize("name", ["mae", "cmae"])
def test_losses_with_a_conv_stem(name):
    module = {"mae": mae, "cmae": cmae}[name]
    light = dict(decoder_width=32, decoder_heads=4, mask_ratio=0.5)
    if name == "mae":
        method = module.MAE(spec(), mae.Config(decoder_depth=1, **light))
    else:
        options = dict(pixel_decoder_depth=1, feature_decoder_depth=1, head_hidden=40, head_out=16, mask_cell=1)
        method = module.CMAE(spec(), cmae.Config(**light, **options, color=NO_COLOR))
    scramble(method)
    weights = doubles(method)
    batch, rng, m = make_batch(method), make_rng(), method.model
    flips, visible = draw_flips(rng, batch.ids), draw_visible(rng, batch.ids, m.num_patches, m.num_patches // 2)
    if name == "cmae":
        visible = [sorted(ids) for ids in visible]
    views = [cut_view(c, m.image_size, 0, 0, f, m.mean, m.std) for c, f in zip(batch.crops[0], flips)]
    decoder = "decoder" if name == "mae" else "pixel_decoder"
    sizes = dict(patch=m.patch_size, heads=HEADS, first="column", final_norm=True)
    latents = [conv_encode(under(weights, "encoder"), view, ids, **sizes) for view, ids in zip(views, visible)]
    first = "column" if name == "mae" else "row"
    preds = [slow_decode(under(weights, decoder), x, ids, m.grid, first) for x, ids in zip(latents, visible)]
    masked = [[i for i in range(m.num_patches) if i not in ids] for ids in visible]
    pixel = pixel_loss(preds, views, masked, m.patch_size, normalize=True)
    out = method(batch, rng)
    torch.testing.assert_close(out.parts["pixel"].double(), pixel.detach(), rtol=1e-5, atol=0)
    loss = pixel
    if name == "cmae":
        contrast = slow_contrast(method, weights, batch, rng, flips, latents, visible)
        torch.testing.assert_close(out.parts["contrast"].double(), contrast.detach(), rtol=1e-5, atol=0)
        loss = pixel + contrast
    out.loss.backward()
    loss.backward()
    assert_same_gradients(method, weights)
    if name == "cmae":
        targets = {id(p.target) for p in method.ema_pairs()}
        followers = set(dict(method.target_encoder.named_parameters()))
        assert {"skip1.linear.weight", "stage1.0.spread.weight"} <= followers
        assert all(id(p) in targets and p.grad is None for p in method.target_encoder.parameters())


def slow_contrast(method, weights, batch, rng, flips, latents, visible):
    """CMAE's, whose target sees the whole shifted view; there is no class token to leave out of the mean."""
    m = method.model
    sizes = dict(patch=m.patch_size, heads=HEADS, first="column", final_norm=False)
    shifts = draw_shifts(rng, batch.ids, 2 * m.patch_size - 1)
    pooled, targets = [], []
    for crop, flip, (top, left), latent, ids in zip(batch.crops[0], flips, shifts, latents, visible):
        pooled.append(slow_decode(under(weights, "feature_decoder"), latent, ids, m.grid, "row").mean(0))
        view = cut_view(crop, m.image_size, top, left, flip, m.mean, m.std)
        targets.append(conv_encode(under(weights, "target_encoder"), view, list(range(m.num_patches)), **sizes).mean(0))
    queries = head(under(weights, "predictor"), head(under(weights, "projector"), torch.stack(pooled)))
    keys = head(under(weights, "target_projector"), torch.stack(targets)).detach()
    return 2 * TAU * info_nce(queries, keys, list(range(len(queries))), TAU)


def slow_decode(weights, latent, visible, grid, first):
    """The slow decoder, without a class token."""
    embedded = latent @ weights["embed.weight"].T + weights["embed.bias"]
    table = position_table(embedded.shape[1], grid, first)[1:]
    x = torch.stack([
        (embedded[visible.index(i)] if i in visible else weights["mask_token"][0, 0]) + table[i]
        for i in range(grid[0] * grid[1])
    ])  # fmt: skip
    for i in range(count_blocks(weights)):
        x = block(under(weights, f"blocks.{i}"), x, 4)
    return layer_norm(weights, "norm", x) @ weights["pred.weight"].T + weights["pred.bias"]


def test_a_conv_stem_that_does_not_fit_is_one_clear_line():
    with pytest.raises(ConfigError, match="divisible by 4, got 6"):
        ConvEncoder(spec((12, 18, 6, 3)))

    class Plain(base.Method):
        pass

    with pytest.raises(ConfigError, match="--stem: expected one of patch for this method, got conv"):
        Plain(spec())
