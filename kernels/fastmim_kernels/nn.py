"""Modules with the arguments, names, parameters and initial values of torch's and timm's, on the ops of this package.

A state dict of the module that one of them stands for loads as it is, and theirs loads ours. Dropout where theirs is. What
has no op here (another activation, oblong patches) and layers that carry hooks or were exchanged for others run as in the
original. torch.compile and torch.export take them, torch.jit does not.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autocast
from .activation import bias_gelu
from .checks import check_integer, check_pair, check_rank, check_tensor, fail, shown
from .layer_norm import add_layer_norm
from .patches import patchify_gather
from .topk import topk_attention

__all__ = ["AddLayerNorm", "Attention", "LayerNorm", "Mlp", "PatchEmbed", "linear_gelu", "project_patches"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LAYOUTS = ("NLC", "NCL", "NHWC", "NCHW")


def placement(device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, object]:
    """Those of the two that are given: a norm_layer of the user's need not take them."""
    return {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}


def as_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) from one number for both, or from the two."""
    return check_pair(name, (value, value) if isinstance(value, int) else value)


def is_observed(module: nn.Module) -> bool:
    """Whether somebody's hook waits for a call of the module."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is of exactly this kind and nobody would notice if it were not called."""
    return type(module) is kind and "forward" not in module.__dict__ and not is_observed(module)


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

    def forward(self, input: Tensor) -> Tensor:
        is_fit = isinstance(input, Tensor) and input.ndim > 1 and len(self.normalized_shape) == 1
        if not is_fit or self.weight is None or not self.weight.numel():
            return super().forward(input)
        return add_layer_norm(input, None, self.weight, self.bias, eps=self.eps)


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
    """timm's ``Mlp``: fc1, activation, dropout, norm, fc2, dropout. Exact GELU, the default, is one op with fc1's bias.

    Args:
        hidden_features, out_features: None: as in_features.
        bias, drop: one for both layers, or a pair.
        use_conv: 1x1 convolutions of (B, C, H, W) in place of linear layers of (..., in_features).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place = placement(device, dtype)
        hidden = hidden_features or in_features
        layer = partial(nn.Conv2d, kernel_size=1) if use_conv else nn.Linear
        biases, drops = (value if isinstance(value, (tuple, list)) else (value, value) for value in (bias, drop))
        self.fc1 = layer(in_features, hidden, bias=biases[0], **place)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden, **place) if norm_layer is not None else nn.Identity()
        self.fc2 = layer(hidden, out_features or in_features, bias=biases[1], **place)
        self.drop2 = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        is_gelu = is_plain(self.act, nn.GELU) and self.act.approximate == "none"
        if is_gelu and is_plain(self.fc1, nn.Linear):
            x = linear_gelu(x, self.fc1.weight, self.fc1.bias)
        else:
            x = self.act(self.fc1(x))
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class Attention(nn.Module):
    """timm's ``Attention``; with ``topk``, each patch attends to its best patches only (``topk_attention``).

    Args:
        dim, dim_out: width of the tokens before and after; dim_out None: dim.
        attn_head_dim: width of a head; None: dim / num_heads.
        qk_norm: norm_layer on the queries and keys of each head. scale_norm: norm_layer on the heads' results, side by side.
        gated: multiply these by the sigmoid of a linear map of the input.
        norm_layer: as ``nn.LayerNorm`` is called; theirs has no default.
        topk: patch keys per query and head; None: all, by torch's own attention.
        num_prefix: tokens before the patches, which every query attends to; counts with topk only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        topk: int | None = None,
        num_prefix: int = 1,
    ):
        super().__init__()
        check_integer("dim, num_heads", dim, num_heads)
        if num_heads < 1:
            raise fail("num_heads", "1 or more", num_heads, "correct it")
        if attn_head_dim is None and dim % num_heads:
            raise fail("dim", f"a multiple of num_heads = {num_heads}", dim, "change one of them")
        if topk is not None and attn_drop:
            raise fail("attn_drop", f"0 with topk = {topk}", attn_drop, "drop one of them")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise fail("norm_layer", "a class with qk_norm or scale_norm", None, "pass nn.LayerNorm")
        place = placement(device, dtype)
        self.num_heads, self.topk, self.num_prefix = num_heads, topk, num_prefix
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **place)
        self.q_norm = norm_layer(self.head_dim, **place) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **place) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **place) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **place) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **place)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, dim) -> (B, N, dim_out). attn_mask, is_causal: as ``F.scaled_dot_product_attention``; not with topk."""
        check_rank("x", x, "(B, N, dim)")
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.topk is None:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        elif attn_mask is not None or is_causal:
            raise fail("attn_mask, is_causal", f"neither with topk = {self.topk}", "one of them", "leave it out")
        else:
            out = topk_attention(q, k, v, self.topk, num_prefix=self.num_prefix)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class PatchEmbed(nn.Module):
    """timm's ``PatchEmbed``: images -> (B, L, embed_dim), or only the patches ``ids``.

    Takes uint8 images, too, with ``mean`` and ``std`` in 0..1 units.

    Args:
        img_size: sides of the images in pixels, one number or (height, width); None: any.
        patch_size: side of a patch in pixels. Pixels at the right and bottom that fill no patch are left out.
        flatten, output_fmt: layout of the result, "NLC" by default, "NCHW" without flatten; output_fmt names any of
            NLC, NCL, NHWC and NCHW.
        strict_img_size: refuse images of another size than img_size; else of sides that patch_size does not divide.
        dynamic_img_pad: fill the last patches up with zeros.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if output_fmt not in (None, *LAYOUTS):
            raise fail("output_fmt", f"None or one of {', '.join(LAYOUTS)}", shown(output_fmt), "correct it")
        self.patch_size = as_pair("patch_size", patch_size)
        if min(self.patch_size) < 1:
            raise fail("patch_size", "1 pixel or more", patch_size, "correct it")
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size, self.dynamic_img_pad = strict_img_size, dynamic_img_pad
        self.img_size = self.grid_size = self.num_patches = None
        self.set_input_size(img_size)
        place = placement(device, dtype)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, **place)
        self.norm = norm_layer(embed_dim, **place) if norm_layer is not None else nn.Identity()

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on. patch_size: as it is; new weights would be another model."""
        if patch_size is not None and as_pair("patch_size", patch_size) != self.patch_size:
            raise fail("patch_size", self.patch_size, patch_size, "build a new module and resample the weights")
        if img_size is not None:
            self.img_size = as_pair("img_size", img_size)
            self.grid_size = tuple(side // p for side, p in zip(self.img_size, self.patch_size, strict=True))
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per patch, the longer side or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of this size."""
        extra = [p - 1 if self.dynamic_img_pad else 0 for p in self.patch_size]
        return tuple((side + e) // p for side, e, p in zip(img_size, extra, self.patch_size, strict=True))

    def forward(self, x: Tensor, ids: Tensor | None = None, **window: object) -> Tensor:
        """ids: (B, K) patches to embed, None: all. window: mean, std, size, offset, flip, as ``patchify_gather``."""
        check_rank("x", x, "(B, C, H, W)")
        size = tuple(window.get("size") or x.shape[2:])
        is_fixed = self.img_size is not None and self.strict_img_size
        if is_fixed and size != self.img_size:
            raise fail("x", f"images of {self.img_size} pixels", size, "resize them or pass img_size")
        missing = [-side % p for side, p in zip(size, self.patch_size, strict=True)]
        if any(missing) and self.dynamic_img_pad:
            if window:
                raise fail(
                    "x", f"images that {self.patch_size} divides, with {sorted(window)}", size, "pad them before"
                )
            x = F.pad(x, (0, missing[1], 0, missing[0]))
            size = tuple(x.shape[2:])
        elif any(missing) and (is_fixed or self.img_size is None):
            size = tuple(side // p * p for side, p in zip(size, self.patch_size, strict=True))
        if is_plain(self.proj, nn.Conv2d) and self.patch_size[0] == self.patch_size[1]:
            tokens = project_patches(x, self.proj.weight, self.proj.bias, ids, **(window | {"size": size}))
        elif ids is not None or window:
            raise fail("ids, window", "neither for oblong patches or a proj with hooks", "one", "leave it out")
        else:
            tokens = self.proj(x[:, :, : size[0], : size[1]]).flatten(2).transpose(1, 2)
        if not self.flatten and self.output_fmt != "NLC":
            if ids is not None:
                raise fail("output_fmt", "NLC with ids", self.output_fmt, "leave one out")
            tokens = self.arrange(tokens, self.dynamic_feat_size(size))
        return self.norm(tokens)

    def arrange(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, L, D) -> output_fmt."""
        if self.output_fmt == "NHWC":
            return tokens.unflatten(1, grid)
        tokens = tokens.transpose(1, 2)
        return tokens if self.output_fmt == "NCL" else tokens.unflatten(2, grid)
