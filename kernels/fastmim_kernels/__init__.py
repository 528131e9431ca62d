"""Kernels for masked image modeling, usable without the rest of fastmim: only torch and the stdlib are imported.

One folder per op: ``__init__.py`` the public function (argument checks, dispatch), ``reference.py`` plain torch and the
truth, ``spec.py`` the cases that one test and one benchmark run; ``kernel.py`` (Triton) and ``native.py`` (C++) where
an op has them. A folder is named by a noun, never like the function in it: ``fastmim_kernels.gather_tokens`` is the
function.
"""

import importlib
from types import ModuleType

from .activation import bias_gelu
from .adamw import adamw_ema
from .block_masks import block_masking
from .dense import gelu_linear, linear
from .depthwise import depthwise_patches
from .dispatch import backends, chosen, states
from .ema import ema_update
from .gather import gather_tokens
from .infonce import contrastive_loss
from .layer_norm import add_layer_norm
from .masks import MaskIds, cell_masking, random_masking
from .mixing import mix_patches, partition, unmix_tokens
from .patch_contrast import patch_contrastive_loss
from .patches import patchify_gather
from .philox import Stream, random_words, uniform
from .pixel_loss import masked_pixel_loss
from .qkv import qkv_attention
from .resize import random_resized_crop
from .restore import restore_tokens
from .token_loss import TokenLoss, linear_cross_entropy
from .topk import topk_attention
from .views import ColorJitter, shift_flip_jitter

__all__ = [
    "ColorJitter",
    "MaskIds",
    "Stream",
    "TokenLoss",
    "adamw_ema",
    "add_layer_norm",
    "backends",
    "bias_gelu",
    "block_masking",
    "cell_masking",
    "chosen",
    "contrastive_loss",
    "depthwise_patches",
    "ema_update",
    "gather_tokens",
    "gelu_linear",
    "linear",
    "linear_cross_entropy",
    "masked_pixel_loss",
    "mix_patches",
    "partition",
    "patch_contrastive_loss",
    "patchify_gather",
    "qkv_attention",
    "random_masking",
    "random_resized_crop",
    "random_words",
    "restore_tokens",
    "shift_flip_jitter",
    "states",
    "topk_attention",
    "uniform",
    "unmix_tokens",
]

# What goes into other people's models, imported where it is used.
MODULES = ("functional", "nn", "patch")


def __getattr__(name: str) -> ModuleType:
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
