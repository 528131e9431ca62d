"""Losses and gradients that the authors' own programs give, on weights, images and masks made by a formula.

The numbers were computed once, in float64, with the weights below under the authors' names and in their layouts. The
programs: facebookresearch/mae models_mae.py at 6a2ba40 with timm 0.3.2; ZhichengHuang/CMAE cmae/models at e786a52 with
mmcv 2.1.0 and mmengine 0.10.4, one process; Alpha-VL/ConvMAE models_convmae.py at 3f3aec9; Atten4Vis/CAE
models/modeling_cae.py and furnace/engine_for_pretraining.py at 1016f85.
"""

import dataclasses
import math
import zlib

import pytest
import torch
from fastmim_kernels import MaskIds
from fastmim_pipelines.spec import Batch
from slow_reference import cells_to_patches, model_spec
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.methods import cae, cmae, mae
from fastmim.methods.base import Method, StepOutput
from fastmim.views import ColorConfig
from fastmim.vit import Encoder

FLIPS = torch.tensor([True, False, False, True])
SHIFTS = torch.tensor([[0, 7], [3, 2], [7, 0], [5, 5]])
NO_COLOR = ColorConfig(0.0, 0.0, 0.0, 0.0, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)


def wave(name: str, shape: torch.Size) -> Tensor:
    """Numbers in -0.5 .. 0.5 from integer arithmetic: the same on every machine."""
    i = torch.arange(math.prod(shape)) + zlib.crc32(name.encode()) % 5000
    return ((i * i % 10007).double() / 10007 - 0.5).view(shape)


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(0.4 * wave(name, parameter.shape) + is_scale)


def images(side: int) -> Tensor:
    """(4, 3, side, side) uint8 of different brightness; most of the first is black: patches without contrast."""
    i = torch.arange(4 * 3 * side * side)
    x = ((i * i // 7 + i // 5) % 256).view(4, 3, side, side)
    x[0, :, :, side // 4 :] = 0
    x[1] = x[1] // 2 + 128
    x[2, 1] //= 8
    return x.to(torch.uint8)


def plan(length: int, kept: int, cell: int = 1) -> MaskIds:
    """Another mask for every image, of `length` patches in a square; `kept` counts squares of `cell` x `cell`."""
    side = math.isqrt(length)
    units = length // cell**2
    orders = []
    for image in range(4):
        visible = [(29 * i + 11 * image) % units for i in range(kept)]
        visible = cells_to_patches(visible, (side, side), cell) if cell > 1 else visible
        orders.append(visible + [patch for patch in range(length) if patch not in visible])
    order, count = torch.tensor(orders), kept * cell**2
    restore = order.argsort(1)
    return MaskIds(order[:, :count], order[:, count:], restore, (restore >= count).float())


class Brightness(nn.Module):
    """A tokenizer of 32 tokens for squares of 2 x 2 pixels."""

    vocabulary, stride = 32, 2

    def forward(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
        tokens = (F.unfold(pixels * 255, 2, stride=2).round().long().sum(1) // 3) % 32
        return tokens if ids is None else tokens.gather(1, ids)


def drop_factors(*depths: int) -> list[Tensor]:
    """Stochastic depth at a rate of 0.2, which spares each network's first block; every third branch is left out."""
    factors = []
    for n, depth in enumerate(depths):
        drop = torch.full((4, depth, 2), 1.25)
        drop.view(-1)[n % 3 :: 3] = 0
        drop[:, 0] = 1
        factors.append(drop)
    return factors


# ---- small methods: 2 blocks of width 48 and 3 heads, the masks and draws of above


@pytest.fixture
def small(small, monkeypatch):
    monkeypatch.setattr(mae, "random_flip", lambda rng, ids: FLIPS)
    monkeypatch.setattr(cmae, "random_flip", lambda rng, ids: FLIPS)
    monkeypatch.setattr(cmae, "random_shift", lambda rng, ids, largest: SHIFTS)
    monkeypatch.setattr(cae, "random_flip", lambda rng, ids: FLIPS)
    monkeypatch.setattr(cae, "random_drop_path", lambda rng, ids, peak, *depths: drop_factors(*depths))


def small_mae(normalize: bool = True) -> mae.MAE:
    config = mae.Config(norm_pix=normalize, decoder_width=32, decoder_depth=2, decoder_heads=4)
    return prepared(mae.MAE(model_spec(32, 32, 4), config), plan(64, 16))


def small_conv_mae() -> mae.MAE:
    """Stages of 16 and 24 channels on 14 x 14 patches, which the published code has fixed; 1 block after them."""
    config = mae.Config(decoder_width=32, decoder_depth=1, decoder_heads=4)
    return prepared(mae.MAE(dataclasses.replace(model_spec(224, 224, 16), stem="conv"), config), plan(196, 49))


def small_cmae() -> cmae.CMAE:
    config = cmae.Config(
        pixel_decoder_depth=2, feature_decoder_depth=1, decoder_width=32, decoder_heads=4, head_hidden=40, head_out=16,
        color=NO_COLOR,
    )  # fmt: skip
    return prepared(cmae.CMAE(model_spec(32, 32, 4), config), plan(64, 5, cell=2))


def small_cae() -> cae.CAE:
    config = cae.Config(regressor_depth=2, decoder_depth=2, decoder_width=32, decoder_heads=4)
    return prepared(cae.CAE(model_spec(32, 32, 4), config, Brightness()), plan(64, 32))


def prepared(method: Method, mask: MaskIds) -> Method:
    fill(method)
    method.mask = lambda rng, ids: mask
    return method


def assert_numbers(method: Method, parts: dict[str, float], slopes: dict[str, float]) -> StepOutput:
    """`slopes`: the gradient of each parameter along a wave of its own, which tells apart entries that changed places."""
    crops = tuple(images(crop.size[0]) for crop in method.crops)
    output = method(Batch(crops, torch.arange(4)), torch.tensor([0, 0]))
    output.loss.backward()
    # In float32 CMAE's own code differs from these numbers by 1e-6 in the loss and by 1e-5 in the slopes.
    assert {name: part.item() for name, part in output.parts.items()} == pytest.approx(parts, rel=5e-6)
    assert output.loss.item() == pytest.approx(sum(parts.values()), rel=5e-6)
    gradients = {name: method.get_parameter(name).grad.double() for name in slopes}
    found = {name: (g * wave("slope " + name, g.shape)).sum().item() for name, g in gradients.items()}
    assert found == pytest.approx(slopes, rel=1e-4)
    return output


# ---- the numbers


def test_mae_is_the_published_code(small):
    slopes = {
        "encoder.patch_embed.weight": -0.0238523851,
        "encoder.cls_token": -0.00130085821,
        "encoder.blocks.0.attn.qkv.weight": -0.00640471041,
        "decoder.mask_token": 0.0493240506,
    }
    assert_numbers(small_mae(), {"pixel": 1.40135152}, slopes)


def test_mae_of_raw_pixels_is_the_published_code(small):
    slopes = {
        "encoder.patch_embed.weight": 0.0417449947,
        "encoder.cls_token": -0.00100327143,
        "encoder.blocks.0.attn.qkv.weight": -0.00233649019,
        "decoder.mask_token": 0.0630583149,
    }
    assert_numbers(small_mae(normalize=False), {"pixel": 2.6913338}, slopes)


def test_conv_stem_is_the_published_code(small):
    slopes = {
        "encoder.embed1.linear.weight": -0.0133113721,
        "encoder.stage1.1.spread.weight": 0.000307062428,
        "encoder.stage2.0.fc1.weight": -0.00247628289,
        "encoder.skip1.linear.weight": -0.0045799956,
    }
    assert_numbers(small_conv_mae(), {"pixel": 1.40605387}, slopes)


def test_cmae_is_the_published_code(small):
    slopes = {
        "encoder.patch_embed.weight": -3.2787283,
        "feature_decoder.mask_token": -0.223655117,
        "projector.1.weight": -0.678785768,
        "predictor.0.weight": -0.740859383,
        "predictor.3.weight": 0.374768577,
        "pixel_decoder.pred.weight": 0.0990570066,
    }
    assert_numbers(small_cmae(), {"pixel": 1.59751132, "contrast": 0.60757761}, slopes)


def test_cae_is_the_published_code(small):
    """With a narrower regressor and decoder, and with stochastic depth in all four passes."""
    slopes = {
        "encoder.patch_embed.weight": -0.0366749801,
        "encoder.blocks.1.gamma_1": 0.00167379035,
        "bridge.0.weight": 0.00552193521,
        "regressor.mask_token": -0.150461141,
        "regressor.blocks.0.attn.k.weight": -0.000932397063,
        "decoder.head.weight": -0.204597663,
    }
    output = assert_numbers(small_cae(), {"token": 3.60076151, "align": 4.33218531}, slopes)
    assert output.measures["mlm_acc"].item() == 3 / 128


def test_encoder_without_key_bias_starts_with_zero_biases(small):
    """Source: Atten4Vis/CAE models/modeling_cae_helper.py `Attention`, models/modeling_cae.py `_init_weights`."""
    torch.manual_seed(0)
    qkv = Encoder(model_spec(), key_bias=False).blocks[0].attn.qkv
    assert qkv.bias is None and not qkv.q_bias.any() and not qkv.v_bias.any()
    # As one matrix of 3 x 48 rows: sqrt(6 / (48 + 144)), not the sqrt(6 / 96) of three.
    assert 0.95 * math.sqrt(6 / 192) < qkv.weight.abs().max() <= math.sqrt(6 / 192)
