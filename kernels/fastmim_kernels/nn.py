"""Modules with the names, parameters and initial values of torch's and timm's, on the ops of this package.

A state dict of the module that one of them stands for loads as it is. Dropout where theirs is.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import autocast
from .activation import bias_gelu
from .checks import check_rank, check_tensor, fail
from .layer_norm import add_layer_norm
from .patches import patchify_gather
from .topk import topk_attention

__all__ = ["AddLayerNorm", "Attention", "LayerNorm", "Mlp", "PatchEmbed", "linear_gelu", "project_patches"]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias))``; on a GPU the bias is added, and its gradient summed, in the activation."""
    check_tensor("x", x)
    if x.device.type == "cpu":
        return bias_gelu(F.linear(x, weight, bias))
    return bias_gelu(F.linear(x, weight), bias)


def project_patches(
    images: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None = None, **window: object
) -> Tensor:
    """A convolution whose stride is its kernel size, as one matrix product, of all patches or of those in ``ids``.

    In plain torch: ``F.conv2d(images, weight, bias, stride=p).flatten(2).transpose(1, 2)``, then the rows ``ids``.

    Args:
        images: (B, C, H, W) floats, or uint8, which count as 0..1. weight: (D, C, p, p). bias: (D,) or None.
        ids: (B, K) int64 or None. window: mean, std, size, offset, flip, as ``patchify_gather``.

    Returns: (B, K, D).
    """
    check_rank("images", images, "(B, C, H, W)")
    check_rank("weight", weight, "(D, C, p, p)")
    if weight.shape[1] != images.shape[1] or weight.shape[2] != weight.shape[3]:
        raise fail("weight", f"shape (D, {images.shape[1]}, p, p)", tuple(weight.shape), "fit it to the channels")
    dtype = autocast.dtype(images.device) or weight.dtype
    patches = patchify_gather(images, ids, weight.shape[2], dtype=dtype, **window)
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension: like x in dtype also under autocast, statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or len(self.normalized_shape) != 1 or x.ndim < 2:
            return super().forward(x)
        return add_layer_norm(x, None, self.weight, self.bias, eps=self.eps)


class AddLayerNorm(nn.LayerNorm):
    """Adds a branch to the residual stream and normalizes the sum. Returns (normalized, new stream)."""

    def forward(
        self, branch: Tensor, stream: Tensor, *, scale: Tensor | None = None, row_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """scale: (D,) layer scale. row_scale: (B,) stochastic depth. See ``add_layer_norm``."""
        return add_layer_norm(
            branch, stream, self.weight, self.bias, scale=scale, row_scale=row_scale, eps=self.eps, prenorm=True
        )


class Mlp(nn.Module):
    """timm's ``Mlp`` with its exact GELU: fc1, GELU, dropout, norm, fc2, dropout."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden, bias=bias)
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.drop1(linear_gelu(x, self.fc1.weight, self.fc1.bias)))
        return self.drop2(self.fc2(hidden))


class Attention(nn.Module):
    """timm's ``Attention``; with ``topk``, each patch attends to its best patches only (``topk_attention``).

    Args:
        topk: patch keys per query and head; None: all, by torch's own attention.
        num_prefix: tokens before the patches, which every query attends to; counts with topk only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = LayerNorm,
        *,
        topk: int | None = None,
        num_prefix: int = 1,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}; change one of them.")
        if topk is not None and attn_drop:
            raise ValueError(f"attn_drop: expected 0 with topk = {topk}, got {attn_drop}; drop one of them.")
        self.num_heads, self.topk, self.num_prefix = num_heads, topk, num_prefix
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.topk is None:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            out = topk_attention(q, k, v, self.topk, num_prefix=self.num_prefix)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))


class PatchEmbed(nn.Module):
    """timm's ``PatchEmbed`` of square patches: images -> (B, L, embed_dim), or only the patches ``ids``.

    Takes uint8 images, too, with ``mean`` and ``std`` in 0..1 units.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = None if self.img_size is None else tuple(side // patch_size for side in self.img_size)
        self.num_patches = None if self.grid_size is None else self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else nn.Identity()

    def forward(self, x: Tensor, ids: Tensor | None = None, **window: object) -> Tensor:
        """ids: (B, K) patches to embed, None: all. window: mean, std, size, offset, flip, as ``patchify_gather``."""
        size = tuple(window.get("size") or x.shape[2:])
        if self.img_size is not None and size != tuple(self.img_size):
            raise ValueError(f"x: expected images of {self.img_size} pixels, got {size}; resize them or pass img_size.")
        return self.norm(project_patches(x, self.proj.weight, self.proj.bias, ids, **window))
