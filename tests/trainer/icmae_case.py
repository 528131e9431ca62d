"""A small ICMAE."""

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import model_spec, scramble

from fastmim.methods import icmae
from fastmim.views import ColorConfig

# (height, width, patch, channels); the patches of the first have as many values (48) as the small encoder is wide.
SHAPES = [(16, 24, 4, 3), (8, 12, 2, 5)]
NO_COLOR = ColorConfig(0.0, 0.0, 0.0, 0.0, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)
SMALL_OPTIONS = dict(decoder_width=32, decoder_heads=4, head_hidden=40, head_out=16)


def build(shape=SHAPES[0], seed=0, scrambled=True, **options):
    torch.manual_seed(seed)
    method = icmae.ICMAE(model_spec(*shape), icmae.Config(**(SMALL_OPTIONS | options)))
    if scrambled:
        scramble(method, seed)
    return method


def make_batch(method, count=5, seed=0) -> Batch:
    """Two random master crops per image, and ids that are no row numbers."""
    g = torch.Generator().manual_seed(seed)
    shape = (2, count, method.model.in_chans, *method.model.image_size)
    return Batch(tuple(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)), torch.arange(count) * 7 + 100)


TERMS = ("pixel_a", "pixel_b", "position", "contrast")


def assert_same_parts(output, slow) -> None:
    terms = [name for name in TERMS if name in slow]
    assert list(output.parts) == terms
    for name in terms:
        assert output.parts[name].item() == pytest.approx(slow[name].item(), rel=1e-5), name
    assert output.loss.item() == pytest.approx(sum(slow[name].item() for name in terms), rel=1e-5)


MODES = {
    "default": {},
    "sd_mse": dict(position="sd_mse"),
    "sd_dec": dict(contrast="sd_dec"),
    "pixels_only": dict(position="none", contrast="none"),
    "position_only": dict(contrast="none", norm_pix=True, decoder_depth=2),
    "contrast_only": dict(position="none", mask_share="complement"),
    "pos_drop": dict(pos_drop=0.34, mask_share="independent"),
    "pos_drop_all": dict(pos_drop=1.0, position="sd_mse", contrast="sd_dec"),
    "frozen": dict(freeze_patch_embed=True),
    "second_key": dict(second_view="key", mask_share="independent"),
    "second_none": dict(second_view="key", contrast="none", position="sd_mse", pos_drop=0.34),
}
