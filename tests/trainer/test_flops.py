"""FLOPs per image against published tables, and against what torch counts in our own steps."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import make_rng, model_spec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim import flops
from fastmim.config import SIZES, ModelSpec
from fastmim.methods import base


def spec(name="vit_base", stem="patch") -> ModelSpec:
    return dataclasses.replace(model_spec(224, 224, 14 if name == "vit_huge" else 16, 3, name), stem=stem)


def cost(method: str, model: ModelSpec | None = None, **options) -> flops.Flops:
    return flops.training_flops(method, model or spec(), base.find(method).Config(**options))


def part(cost: flops.Flops, name: str) -> float:
    (term,) = (t for t in cost.terms if t.name == name)
    return term.forward


# ---- published figures: GMAC of a forward pass (two FLOPs each), GFLOP of forward and backward

FORWARD_GMAC = [
    ("mae", {}, 9.78),
    ("mae", dict(decoder_depth=4), 7.14),
    ("mae", dict(decoder_depth=2), 5.82),
    ("mae", dict(decoder_depth=1), 5.17),
    ("mae", dict(decoder_width=256), 5.86),
    ("mae", dict(decoder_width=256, decoder_depth=1), 4.63),
    ("mae", dict(decoder_width=128), 4.82),
    ("mae", dict(decoder_width=128, decoder_depth=1), 4.48),
    ("cmae", {}, 30.4),
    ("cmae", dict(mask_ratio=0.75), 28.8),
    ("simmim", {}, 17.68),
    # Targets are d-VAE tokens, computed or recorded; or pixels, whose head is smaller.
    ("cae", dict(tokenizer="encoder.pkl"), 24.2 + 26.06),
    ("cae", dict(target="dvae", tokens="folder"), 24.2),
    ("cae", {}, 24.2 - 0.617 + 0.058),
    # Per image of a mixture: 49.25 tokens in the encoder, 197 in the decoder at 1/4.
    ("mixedae", {}, 9.771),
    ("mixedae", dict(members=2), 14.19),
    ("mixedae", dict(members=8), 7.56),
    ("mixedae", dict(members=2, mode="full"), 28.38),
    ("mixedae", dict(members=4, mode="full"), 39.08),
    # Both views, 1 x 128 decoder, position head, contrast with and without momentum encoder, and SDMAE's wiring.
    ("icmae", {}, 17.8),
    ("icmae", dict(contrast="sd_dec"), 20.7),
    ("icmae", dict(contrast="none", position="none"), 2 * 4.48),
]


@pytest.mark.parametrize(("method", "options", "gmac"), FORWARD_GMAC, ids=lambda v: str(v).replace(" ", ""))
def test_forward_of_vit_base_equals_the_published_arithmetic(method, options, gmac):
    assert cost(method, **options).forward == pytest.approx(2e9 * gmac, rel=0.01)


# CAE has no vit_huge: the tokenizer is counted at 8 x 8 pixels for each of its 256 patches.
TRAINING_GFLOP = [
    ("mae", {"vit_small": 38.9, "vit_base": 58.5, "vit_large": 124.2, "vit_huge": 291.0}),
    ("cmae", {"vit_small": 58.9, "vit_base": 112.1, "vit_large": 291.3, "vit_huge": 730}),
    ("cae", {"vit_small": 81.4, "vit_base": 162.4, "vit_large": 366.5, "vit_huge": 871}),
    ("mixedae", {"vit_small": 39.2, "vit_base": 58.9, "vit_large": 125.0, "vit_huge": 294}),
    ("icmae", {"vit_small": 18.9, "vit_base": 71.0, "vit_large": 246, "vit_huge": 664}),
]


@pytest.mark.parametrize(
    ("method", "size", "gflop"), [(m, s, g) for m, sizes in TRAINING_GFLOP for s, g in sizes.items()]
)
def test_training_of_all_sizes_equals_the_published_arithmetic(method, size, gflop):
    options = dict(tokenizer="encoder.pkl") if method == "cae" else {}
    assert cost(method, spec(size), **options).training == pytest.approx(1e9 * gflop, rel=0.01)


def test_parts_of_mae_base():
    """Multiply-adds written out: 49 visible patches and the class token; 197 tokens in the decoder."""
    c, d, w = cost("mae"), 768, 512
    assert part(c, "encoder: patches") == 2 * 196 * 768 * d
    assert part(c, "encoder") == 2 * 12 * (50 * (3 * d * d + d * d + 8 * d * d) + 2 * 50 * 50 * d)
    blocks = 8 * (197 * (3 * w * w + w * w + 8 * w * w) + 2 * 197 * 197 * w)
    assert part(c, "decoder") == 2 * (50 * d * w + blocks + 197 * w * 768)
    assert c.forward == sum(t.forward for t in c.terms)
    assert c.training == 3 * c.forward - part(c, "encoder: patches")


def test_parts_of_cmae_base():
    c = cost("cmae")
    gmac = {"encoder": 6.06 - 0.116, "target encoder": 17.56 - 0.116, "pixel decoder": 5.38, "feature decoder": 1.42}
    for name, value in gmac.items():
        assert part(c, name) == pytest.approx(2e9 * value, rel=0.005), name
    frozen = sum(t.forward for t in c.terms if t.name.startswith("target"))
    assert c.training == 3 * (c.forward - frozen) + frozen - part(c, "encoder: patches")


def test_convmae_stem():
    """CMAE on ConvMAE's encoder, 49 visible patches: stem and skips 8.02, online 11.9, target 23.9, all 42.6 GMAC."""
    c = cost("cmae", spec(stem="conv"), mask_ratio=0.75, mask_cell=1)
    stem = part(c, "encoder: patches") + part(c, "encoder: stages")
    assert stem == pytest.approx(2e9 * 8.02, rel=0.005)
    assert stem + part(c, "encoder") == pytest.approx(2e9 * 11.9, rel=0.005)
    target = sum(t.forward for t in c.terms if t.name.startswith("target encoder"))
    assert target == pytest.approx(2e9 * 23.9, rel=0.005)
    assert c.forward == pytest.approx(2e9 * 42.6, rel=0.005) and c.training == pytest.approx(2e9 * 80, rel=0.01)


def test_parts_of_cae_base():
    c = cost("cae", tokenizer="encoder.pkl")
    gmac = {"encoder": 8.59, "regressor": 3.355, "decoder": 2.834, "head": 0.617, "tokenizer": 26.06}
    for name, value in gmac.items():
        assert part(c, name) == pytest.approx(2e9 * value, rel=0.002), name
    assert part(c, "target encoder") == part(c, "encoder") and part(c, "target bridge") == 0
    wide = cost("cae", decoder_width=512)
    assert part(wide, "target bridge") == 2 * 98 * 768 * 512
    assert part(wide, "regressor") > part(cost("cae", decoder_width=512, regressor_depth=0), "regressor") > 0


def test_parts_of_mixedae_and_icmae_base():
    assert part(cost("mixedae"), "contrast") == 2 * 196 * 196 * 768 / 4
    assert not [t for t in cost("mixedae", contrast_weight=0.0).terms if t.name == "contrast"]
    assert flops.PROJECTION_OUT == base.find("mixedae").PROJECTION_OUT
    mlp = part(cost("mixedae", projection="mlp"), "contrast")
    assert mlp == 2 * 196 * (768 * 768 + 768 * 256 + 196 * 256) / 4
    c = cost("icmae")
    assert part(c, "position head") == 2 * 2 * 49 * (768 * 384 + 384 * 196)
    assert part(cost("icmae", pos_drop=0.5), "position head") == part(c, "position head") * 24 / 49
    frozen = cost("icmae", freeze_patch_embed=True)
    assert frozen.forward == c.forward and c.training - frozen.training == 2 * 2 * 196 * 768 * 768


# ---- what torch counts, for odd sizes

ODD = model_spec(48, 80, 8, 3, "vit_pico")
PATCHES, VALUES, WIDTH = ODD.num_patches, ODD.patch_values, SIZES[ODD.name].width
BATCH = 4


def counted(method: str, options, *, backward: bool) -> float:
    """FLOPs of matrix products per image, of the implementation."""
    torch.manual_seed(0)
    built = base.find(method).METHOD(ODD, options)
    crops = tuple(torch.randint(0, 256, (BATCH, 3, *crop.size), dtype=torch.uint8) for crop in built.crops)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = built(Batch(crops, torch.arange(BATCH)), make_rng()).loss
        if backward:
            loss.backward()
    return counter.get_total_flops() / BATCH


def embed(patches: int) -> int:
    return 2 * patches * VALUES * WIDTH


def predict(tokens: int, width: int) -> int:
    return 2 * tokens * width * VALUES


# Per case: method, options, and what ours leaves out without changing the result, as (FLOPs, passes), negative for what
# the figures leave out: InfoNCE between the images of this batch, whose keys need no gradient.
CASES = {
    # 12 of 60 patches stay visible; the decoder predicts the other 48 of its 61 tokens.
    "mae": ("mae", dict(mask_ratio=0.8, decoder_width=48, decoder_depth=3, decoder_heads=4),
            [(embed(48), 2), (predict(61 - 48, 48), 3)]),
    # 5 of 15 cells of 4 patches; one pooled vector instead of 61.
    "cmae": ("cmae", dict(pixel_decoder_depth=2, feature_decoder_depth=1, decoder_width=64, decoder_heads=4),
             [(embed(40), 2), (predict(61 - 40, 64), 3), (2 * 60 * 64 * WIDTH, 3), (-2 * BATCH * 256, 2)]),
    # 6 of 15 cells; only masked patches are predicted.
    "simmim": ("simmim", {}, [(embed(36), 2), (predict(24, WIDTH), 3)]),
    # Visible and masked patches are each embedded once, where the published code embeds all of them twice.
    "cae": ("cae", dict(target="pixel", regressor_depth=3, decoder_depth=2), [(embed(30), 2), (embed(30), 1)]),
    # One mixture per pair of images; predicted are the 30 patches that it does not show of an image.
    "mixedae": ("mixedae", dict(members=2, decoder_width=64, decoder_heads=4), [(predict(61 - 30, 64), 3)]),
    "mixedae-full": ("mixedae", dict(members=2, mode="full", decoder_width=64, decoder_heads=4, contrast_weight=0.0),
                     [(2 * predict(61 - 30, 64), 3)]),
    # A class token for each of two images; a decoder gets one of them.
    "mixedae-class-per-image": (
        "mixedae", dict(members=2, cls_mode="per_image", homologous="oracle", decoder_width=64, decoder_heads=4),
        [(predict(61 - 30, 64), 3)]),
    # Two views of 15 visible patches, through the encoder and the target encoder; InfoNCE in both directions.
    "icmae": ("icmae", dict(head_hidden=96, head_out=32, decoder_heads=4),
              [(2 * embed(45), 2), (2 * embed(45), 1), (2 * predict(61 - 45, 128), 3), (-2 * 2 * BATCH * 32, 2)]),
    # One through the encoder, the other through the target encoder; one direction.
    "icmae-key": ("icmae", dict(second_view="key", head_hidden=96, head_out=32, decoder_heads=4),
                  [(embed(45), 2), (embed(45), 1), (predict(61 - 45, 128), 3), (-2 * BATCH * 32, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_figures_are_what_torch_counts_in_our_step_and_what_we_save(case, monkeypatch):
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")  # torch counts its own products alone
    monkeypatch.setenv("FASTMIM_SAVERS", "off")  # what they save: test_savers.py
    method, options, savings = CASES[case]
    o = base.find(method).Config(**options)
    figure = flops.training_flops(method, ODD, o)
    assert counted(method, o, backward=False) == figure.forward - sum(f for f, _ in savings)
    assert counted(method, o, backward=True) == figure.training - sum(passes * f for f, passes in savings)


# ---- the table of docs/methods.md


def test_the_documented_costs_are_those_of_the_paper_presets():
    text = (Path(flops.__file__).parents[1] / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)`([^|]*)\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == set(flops.FORMULAS)
    mae_training = cost("mae").training
    for name, variant, forward, training, ratio in rows:
        options = base.find(name).PRESETS["paper"].options
        if "d-VAE" in variant:
            options = dataclasses.replace(options, tokenizer="encoder.pkl")
        c = flops.training_flops(name, spec(), options)
        documented = [f"{c.forward / 1e9:.1f}", f"{c.training / 1e9:.1f}", f"{c.training / mae_training:.1f}"]
        assert [forward, training, ratio] == documented, name


# ---- methods without a figure, devices, utilization


def test_unknown_method_has_no_figure_unless_it_brings_a_formula():
    assert flops.training_flops("new", spec(), None) is None
    own = flops.training_flops(
        "new", spec(), 3, lambda model, options: [flops.Term("all", options * model.num_patches)]
    )
    assert (own.forward, own.training) == (3 * 196, 9 * 196)
    first = flops.training_flops("mae", spec(), 5, lambda model, options: [flops.Term("all", options, flops.FROZEN)])
    assert first.training == 5, "a method's own formula comes first"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A6000", 155), ("NVIDIA H20", 148),
    ],
)  # fmt: skip
def test_peak_of_known_devices(name, tflops):
    assert flops.peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name", ["cpu", "", "NVIDIA A10G", "NVIDIA H2000", "Quadro P1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_peak_of_other_devices_is_unknown(name):
    assert flops.peak_flops(name) is None


def test_mfu_is_the_share_of_the_peak():
    # 4225 ViT-B MAE images per second on one H200: 25 % of 989 TFLOP/s.
    assert flops.mfu(4225, cost("mae"), flops.peak_flops("NVIDIA H200")) == pytest.approx(0.25, rel=0.002)
    assert flops.mfu(4225, cost("mae"), None) is None and flops.mfu(4225, None, 1e12) is None
