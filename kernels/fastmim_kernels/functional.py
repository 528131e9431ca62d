"""Every op as a plain function, beside layer_norm and gelu with the signatures of torch.nn.functional.

``import fastmim_kernels.functional as F`` where ``import torch.nn.functional as F`` stood.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from . import (
    adamw_ema,
    add_layer_norm,
    bias_gelu,
    block_masking,
    cell_masking,
    contrastive_loss,
    depthwise_patches,
    ema_update,
    gather_tokens,
    gelu_linear,
    linear,
    linear_cross_entropy,
    masked_pixel_loss,
    mix_patches,
    partition,
    patch_contrastive_loss,
    patchify_gather,
    qkv_attention,
    random_masking,
    random_resized_crop,
    random_words,
    restore_tokens,
    shift_flip_jitter,
    topk_attention,
    uniform,
    unmix_tokens,
)
from .nn import linear_gelu, project_patches

__all__ = [
    "adamw_ema",
    "add_layer_norm",
    "bias_gelu",
    "block_masking",
    "cell_masking",
    "contrastive_loss",
    "depthwise_patches",
    "ema_update",
    "gather_tokens",
    "gelu",
    "gelu_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "masked_pixel_loss",
    "mix_patches",
    "partition",
    "patch_contrastive_loss",
    "patchify_gather",
    "project_patches",
    "qkv_attention",
    "random_masking",
    "random_resized_crop",
    "random_words",
    "restore_tokens",
    "shift_flip_jitter",
    "topk_attention",
    "uniform",
    "unmix_tokens",
]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``; several dimensions or no weight are left to it. Keeps the dtype of ``input``,
    also under autocast."""
    is_last = isinstance(normalized_shape, (list, tuple)) and isinstance(input, Tensor)
    if weight is None or not is_last or input.ndim < 2 or tuple(normalized_shape) != tuple(input.shape[-1:]):
        return torch_functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return add_layer_norm(input, None, weight, bias, eps=eps)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``; the approximation is left to it."""
    if approximate != "none" or not torch.is_floating_point(input):
        return torch_functional.gelu(input, approximate=approximate)
    return bias_gelu(input)
