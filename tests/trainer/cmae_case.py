"""A small CMAE."""

import torch
from slow_reference import SMALL, model_spec, scramble

from fastmim.methods import cmae
from fastmim.views import ColorConfig

# (height, width, patch, channels)
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]

NO_COLOR = ColorConfig(0.0, 0.0, 0.0, 0.0, jitter_probability=0.0, grey_probability=0.0, blur_probability=0.0)
SMALL_OPTIONS = dict(
    pixel_decoder_depth=2, feature_decoder_depth=1, decoder_width=32, decoder_heads=4, head_hidden=40, head_out=16,
)  # fmt: skip

# floor(6 x .35) of the six 2 x 2 cells of a grid of 4 x 6 patches.
SIZES_OF_CASE = dict(cell=2, kept_cells=2, heads=SMALL[2], decoder_heads=4)
TAU = 0.07


def build(shape=SHAPES[0], seed=0, **options):
    torch.manual_seed(seed)
    method = cmae.CMAE(model_spec(*shape), cmae.Config(**(SMALL_OPTIONS | options)))
    scramble(method, seed)
    return method
