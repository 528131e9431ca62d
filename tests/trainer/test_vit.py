"""Encoder and decoder against a written-out transformer; position tables, sizes, initial weights."""

import math

import pytest
import torch
from slow_reference import (
    SMALL,
    block,
    cut_view,
    decode,
    doubles,
    encode,
    make_rng,
    model_spec,
    patch_rows,
    position_table,
    scramble,
    softmax_attention,
)
from torch import nn

from fastmim.blocks import Branch
from fastmim.config import SIZES, ModelSpec, Size
from fastmim.masking import RandomPolicy
from fastmim.vit import Block, Decoder, DecoderSpec, Encoder, attention, sincos_position

SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (6, 8, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]


def images_of(spec: ModelSpec, count=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, spec.in_chans, *spec.image_size), generator=g, dtype=torch.uint8)


def views_of(spec: ModelSpec, images):
    return [cut_view(image, spec.image_size, 0, 0, False, spec.mean, spec.std) for image in images]


# ---- position table


@pytest.mark.parametrize("first", ["column", "row"])
@pytest.mark.parametrize("grid", [(14, 14), (2, 5), (3, 1)], ids=str)
@pytest.mark.parametrize("width", [8, 512])
def test_position_is_the_direct_formula(width, grid, first):
    table = sincos_position(width, grid, first)
    assert table.dtype == torch.float32 and table.shape == (1 + grid[0] * grid[1], width)
    assert not table[0].any()
    torch.testing.assert_close(table.double(), position_table(width, grid, first), rtol=0, atol=1e-7)


def test_position_of_row_0_column_1_by_hand():
    """Frequencies 1 and 1/100 at width 8: MAE puts the column first, CMAE (MoCo v3) the row."""
    column = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    zero = [0.0, 0.0, 1.0, 1.0]
    expected = torch.tensor([column + zero, zero + column])
    got = torch.stack([sincos_position(8, (3, 4), first)[1 + 1] for first in ("column", "row")])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)


def test_position_refuses_a_width_that_four_does_not_divide():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position(10, (2, 2))


def test_encoder_and_decoder_positions_are_frozen_buffers(small):
    spec = model_spec()
    for module in (Encoder(spec), Decoder(spec, DecoderSpec(32, 1, 4), 7)):
        assert "position" in dict(module.named_buffers())
        assert not any("position" in name for name, _ in module.named_parameters())
        assert not any("position" in name for name in module.state_dict())


# ---- blocks


@pytest.mark.parametrize("length", [1, 7, 50])
def test_attention_is_softmax_of_scaled_products(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8) for _ in range(3))
    out = attention(q, k, v)
    for b in range(2):
        for h in range(3):
            slow = softmax_attention(q[b, h].double(), k[b, h].double(), v[b, h].double())
            torch.testing.assert_close(out[b, h].double(), slow, rtol=1e-5, atol=1e-6)


def test_attention_written_out_for_low_precision_training_agrees():
    """bf16 with gradients takes another path on CPUs; bf16 has 8 bits: 2^-8 of the values' size."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 19, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v)
    slow = softmax_attention(q[1, 2].detach().double(), k[1, 2].detach().double(), v[1, 2].detach().double())
    torch.testing.assert_close(out[1, 2].double(), slow, rtol=0, atol=3e-2)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), out, rtol=0, atol=3e-2)


def test_block_equals_written_out_block():
    torch.manual_seed(0)
    module = Block(24, 3)
    scramble(module)
    x = torch.randn(2, 9, 24)
    slow = torch.stack([block(doubles(module), row.double(), 3) for row in x])
    stream, branch = module(x)
    torch.testing.assert_close(branch.added_to(stream).double(), slow, rtol=1e-5, atol=1e-5)
    # What the block before left to be added is a part of the input.
    scale, rows = 2 + torch.rand(24), 1 + torch.rand(2)
    left = Branch(0.75 * x / scale / rows[:, None, None], scale, rows)
    stream, branch = module(0.25 * x, left)
    torch.testing.assert_close(branch.added_to(stream).double(), slow, rtol=1e-5, atol=1e-5)


# ---- encoder


@pytest.mark.parametrize("final_norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("first", ["column", "row"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_encoder_equals_convolution_and_written_out_blocks(small, shape, first, final_norm):
    """Visible patches in drawn order, and all patches."""
    spec = model_spec(*shape)
    module = Encoder(spec, final_norm=final_norm, position=first)
    scramble(module)
    views = views_of(spec, images_of(spec))
    rows = torch.stack([patch_rows(view, spec.patch_size) for view in views])
    sizes = dict(patch=spec.patch_size, heads=SMALL[2], first=first, final_norm=final_norm)
    ids = torch.tensor([[5, 0, 3], [2, 11, 7]])
    out = module(torch.stack([row[i] for row, i in zip(rows, ids)]).float(), ids)
    slow = torch.stack([encode(doubles(module), view, i.tolist(), **sizes) for view, i in zip(views, ids)])
    torch.testing.assert_close(out.double(), slow, rtol=1e-5, atol=2e-5)
    everything = list(range(spec.num_patches))
    slow = torch.stack([encode(doubles(module), view, everything, **sizes) for view in views])
    torch.testing.assert_close(module(rows.float()).double(), slow, rtol=1e-5, atol=2e-5)


def test_encoder_vit_tiny_12_blocks_equals_written_out_blocks():
    spec = model_spec(8, 8, 4, 3)
    module = Encoder(spec)
    views = views_of(spec, images_of(spec, 1))
    slow = encode(doubles(module), views[0], [2, 1], patch=4, heads=3, first="column", final_norm=True)
    ids = torch.tensor([[2, 1]])
    out = module(patch_rows(views[0], 4)[None, [2, 1]].float(), ids)
    torch.testing.assert_close(out[0].double(), slow, rtol=1e-5, atol=2e-5)


def test_encoder_without_final_norm_has_no_parameters_for_it(small):
    spec = model_spec()
    with_norm, without = (dict(Encoder(spec, final_norm=f).named_parameters()) for f in (True, False))
    assert set(with_norm) - set(without) == {"norm.weight", "norm.bias"}


def test_encoder_features_are_the_mean_of_patch_tokens(small):
    spec = model_spec()
    module = Encoder(spec)
    scramble(module)
    images = images_of(spec)
    everything = list(range(spec.num_patches))
    for feature, view in zip(module.features(images), views_of(spec, images)):
        tokens = encode(doubles(module), view, everything, patch=4, heads=3, first="column", final_norm=True)
        torch.testing.assert_close(feature.double(), tokens[1:].mean(0), rtol=1e-5, atol=1e-5)


# ---- decoder


@pytest.mark.parametrize("first", ["column", "row"])
@pytest.mark.parametrize("decoder", [DecoderSpec(32, 2, 4), DecoderSpec(20, 1, 2), DecoderSpec(64, 1, 16)], ids=str)
def test_decoder_equals_written_out_decoder(small, decoder, first):
    spec = model_spec()
    module = Decoder(spec, decoder, 11, position=first)
    pooled = Decoder(spec, decoder, 11, position=first, pool=True)
    scramble(module)
    pooled.load_state_dict(module.state_dict())
    plan = RandomPolicy(spec, 0.7)(make_rng(), torch.tensor([4, 9]))
    latent = torch.randn(2, 1 + plan.ids_keep.shape[1], SMALL[0])
    weights = doubles(module)
    slow = torch.stack([
        decode(weights, x.double(), keep.tolist(), grid=spec.grid, heads=decoder.heads, first=first)
        for x, keep in zip(latent, plan.ids_keep)
    ])  # fmt: skip
    close = dict(rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(module(latent, plan.ids_restore).double(), slow, **close)
    masked = torch.stack([row[ids] for row, ids in zip(slow, plan.ids_masked)])
    torch.testing.assert_close(module(latent, plan.ids_restore, plan.ids_masked).double(), masked, **close)
    # The feature decoder's mean is over all patches, visible and masked, after the last linear map.
    torch.testing.assert_close(pooled(latent, plan.ids_restore).double(), slow.mean(1), **close)


# ---- sizes


def count(module: nn.Module, prefix: str = "") -> int:
    return sum(p.numel() for n, p in module.named_parameters() if n.startswith(prefix))


@pytest.mark.parametrize(
    "name, patch, width, depth, heads",
    [
        ("vit_tiny", 16, 192, 12, 3),
        ("vit_small", 16, 384, 12, 6),
        ("vit_base", 16, 768, 12, 12),
        ("vit_large", 16, 1024, 24, 16),
        ("vit_huge", 14, 1280, 32, 16),
    ],
)
def test_encoder_sizes_are_the_published_ones(name, patch, width, depth, heads):
    with torch.device("meta"):
        module = Encoder(model_spec(224, 224, patch, 3, name))
    assert (module.width, len(module.blocks), module.blocks[0].attn.heads) == (width, depth, heads)
    per_block = 12 * width**2 + 13 * width
    assert count(module) == (patch**2 * 3 * width + width) + width + depth * per_block + 2 * width


def test_encoder_base_has_85_65_million_parameters():
    with torch.device("meta"):
        assert round(count(Encoder(model_spec(224, 224, 16, 3, "vit_base"))) / 1e6, 2) == 85.65


def test_decoder_default_is_512_wide_8_deep_16_heads():
    assert DecoderSpec() == (512, 8, 16)
    with torch.device("meta"):
        module = Decoder(model_spec(224, 224, 16, 3, "vit_base"), DecoderSpec(), 768)
    assert round(count(module) / 1e6, 1) == 26.0


# ---- initial weights


@pytest.fixture(scope="module")
def fresh():
    """ViT-B's width with one block, and a decoder of the published width."""
    patched = pytest.MonkeyPatch()
    patched.setitem(SIZES, "vit_base", Size(768, 1, 12))
    torch.manual_seed(0)
    spec = model_spec(32, 32, 16, 3, "vit_base")
    yield Encoder(spec), Decoder(spec, DecoderSpec(512, 1, 16), 768)
    patched.undo()


def assert_uniform(values: torch.Tensor, bound: float) -> None:
    assert 0.99 * bound < values.abs().max() <= bound * (1 + 1e-6)
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_initialize_linear_weights_are_xavier_uniform(fresh):
    for module in fresh:
        linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
        assert len(linears) >= 5
        for part in linears:
            assert_uniform(part.weight, math.sqrt(6 / (part.in_features + part.out_features)))


def test_initialize_takes_qkv_as_one_matrix(fresh):
    weight = fresh[0].blocks[0].attn.qkv.weight
    assert tuple(weight.shape) == (2304, 768)
    assert_uniform(weight, math.sqrt(6 / 3072))
    assert weight.abs().max() < 0.0443


def test_initialize_biases_are_zero_but_the_patch_embedding_s(fresh):
    for module in fresh:
        for name, parameter in module.named_parameters():
            if name == "patch_embed.bias":
                # torch's default for a convolution of fan-in 768; 768 draws reach 99 % of the bound.
                bound = 1 / math.sqrt(768)
                assert 0.97 * bound < parameter.abs().max() <= bound
                assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            elif name.endswith("bias"):
                assert not parameter.any(), name


def test_initialize_layer_norms_and_tokens(fresh):
    for module in fresh:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                assert (part.weight == 1).all() and not part.bias.any() and part.eps == 1e-6
    for token in (fresh[0].cls_token, fresh[1].mask_token):
        assert token.ndim == 3 and token.shape[:2] == (1, 1)
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
        assert abs(token.mean().item()) < 4 * 0.02 / math.sqrt(token.numel())
