"""Vision transformers: position table, encoder, light decoder.

They know nothing of masking policy: who is visible arrives as patch indices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastmim_kernels import gather_tokens, patchify_gather, restore_tokens
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim import savers
from fastmim.blocks import Attend, Block, Branch, Linear, Norm, Sum, attention, in_stream_dtype, run_blocks
from fastmim.config import SIZES, ConfigError, ModelSpec


def sincos_position(width: int, grid: tuple[int, int], first: str = "column") -> Tensor:
    """Fixed 2-D sine-cosine position table with a zero row for the class token.

    Args:
        width: channels, a multiple of 4.
        grid: patches per column and per row.
        first: coordinate that the first half of the channels encodes: "column" (MAE) or "row" (MoCo v3, CMAE).

    Returns:
        (1 + grid[0] * grid[1], width) float32; each half is [sin(c w_i), cos(c w_i)], w_i = 10000^(-i / (width / 4)).

    Source: facebookresearch/mae util/pos_embed.py (layout); arXiv 1706.03762 section 3.5 (frequencies).
    """
    if width % 4:
        raise ValueError(f"width: expected a multiple of 4, got {width}")
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    order = (column, row) if first == "column" else (row, column)
    angles = [coordinate.reshape(-1, 1).double() * frequency for coordinate in order]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(1, width), table]).float()


class Encoder(nn.Module):
    """ViT encoder that is given the patches it shall see.

    Args:
        model: sizes.
        final_norm: LayerNorm after the last block.
        position: see `sincos_position`; None: no absolute position.
        layer_scale, key_bias: see `Block`.
    """

    num_prefix = 1
    """Tokens before the patches: the class token."""

    def __init__(
        self,
        model: ModelSpec,
        *,
        final_norm: bool = True,
        position: str | None = "column",
        layer_scale: float = 0.0,
        key_bias: bool = True,
    ):
        super().__init__()
        width, depth, heads = SIZES[model.name]
        self.model, self.width = model, width
        # What `export` has to know to build this network again.
        self.design = dict(final_norm=final_norm, position=position, layer_scale=layer_scale, key_bias=key_bias)
        self.patch_embed = Linear(model.patch_values, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        table = sincos_position(width, model.grid, position or "column")
        self.register_buffer("position", table if position else torch.zeros_like(table), persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, layer_scale=layer_scale, key_bias=key_bias) for _ in range(depth)
        )
        self.norm = Norm(width) if final_norm else Sum()
        initialize(self)

    def embed(self, patches: Tensor, ids: Tensor | None) -> Tensor:
        """(B, K, V) patches -> (B, K, D) tokens, before position. For subclasses that replace some of them."""
        return self.patch_embed(patches)

    def forward(
        self,
        patches: Tensor,
        ids: Tensor | None = None,
        *,
        extra: Tensor | None = None,
        classes: Tensor | None = None,
        attend: Attend | Sequence[Attend] = attention,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Encodes.

        Args:
            patches: (B, K, V).
            ids: (B, K) their indices in the grid; None: all, in raster order.
            extra: added to the patch tokens, broadcasts against (B, K, D).
            classes: (P, D) added to the class token, which then stands P times; None: once, by itself.
            attend: the attention of all blocks, or one per block.
            drop: (B, depth, 2), see `random_drop_path`.

        Returns:
            (B, 1 + K, D), class token first; (B, P + K, D) with classes.
        """
        x = self.embed(patches, ids)
        if self.design["position"]:
            x = x + (self.position[1:] if ids is None else self.position[1:][ids])
        if extra is not None:
            x = x + extra
        cls = self.cls_token + self.position[0]
        cls = (cls if classes is None else cls + classes).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)
        return self.norm(*run_blocks(self.blocks, x, attend, drop))[0]

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 images of the model's size -> (B, D): mean over the patch tokens of the whole image."""
        m = self.model
        return self(patchify_gather(images, None, m.patch_size, mean=m.mean, std=m.std))[:, self.num_prefix :].mean(1)


class DecoderSpec(NamedTuple):
    """Source of the default: MAE (arXiv 2111.06377 section 3): 512 wide, 8 blocks, 16 heads."""

    width: int = 512
    depth: int = 8
    heads: int = 16


class Decoder(nn.Module):
    """Light ViT decoder: visible tokens + mask tokens -> a vector per patch.

    Args:
        model: sizes of the encoder before it.
        spec: own sizes.
        out_values: length of the predicted vectors.
        position: see `sincos_position`.
        pool: predict one vector per image, from the mean over all patch tokens. The mean is taken before the last
            linear map, with which it commutes: the same result for 1 / L of the work.
        num_prefix: tokens of the encoder that stand for no patch: 1 for the class token, 0 without one.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: DecoderSpec,
        out_values: int,
        *,
        position: str = "column",
        pool: bool = False,
        num_prefix: int = 1,
    ):
        super().__init__()
        if spec.heads < 1 or spec.width < 4 or spec.width % 4 or spec.width % spec.heads:
            raise ConfigError(
                f"decoder_width, decoder_heads: expected a positive multiple of 4 and of the number of heads, got "
                f"{spec.width} and {spec.heads}"
            )
        if spec.depth < 1:
            raise ConfigError(f"decoder depth: expected at least 1 block, got {spec.depth}")
        self.pool, self.num_prefix, self.savers = pool, num_prefix, savers.chosen()
        self.embed = Linear(SIZES[model.name].width, spec.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.register_buffer("position", sincos_position(spec.width, model.grid, position), persistent=False)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.depth))
        self.norm = Norm(spec.width)
        self.pred = Linear(spec.width, out_values)
        initialize(self)

    def fill(self, tokens: Tensor, layout: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
        """Every token at its patch, the mask token elsewhere, positions added.

        With `places`, what a subclass overrides whose images are laid out else.

        Args:
            tokens: (B, prefix + K, W) of the visible patches.
            layout: as `forward` gets it.
            mask_token, position: (W,), (prefix + L, W).

        Returns:
            (B, prefix + L, W).
        """
        return restore_tokens(tokens, mask_token, position, layout, num_prefix=self.num_prefix)

    def places(self, table: Tensor, layout: Tensor, count: int) -> Tensor:
        """Rows (B, count, W), or (count, W), of a table (prefix + L, W) that belong to the `count` tokens that `fill` gets."""
        ids_keep = inverse(layout)[:, : count - self.num_prefix] + self.num_prefix
        prefix = torch.arange(self.num_prefix, device=layout.device).expand(len(layout), -1)
        return gather_tokens(table.expand(len(layout), -1, -1), torch.cat([prefix, ids_keep], dim=1))

    def hidden(self, latent: Tensor, layout: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Branch]:
        """(B, prefix + K, D) encoder output -> (B, prefix + L, width) stream, and what is still to be added to it.

        Args:
            rows: (B, M) the only tokens that are wanted.
        """
        position = self.position[1 - self.num_prefix :]
        tokens, mask_token = self.embed(latent), self.mask_token.flatten()
        x = self.fill(tokens, layout, mask_token, position)
        qkv = self.projections(tokens, layout, mask_token, position, x.dtype) if "first" in self.savers else None
        return run_blocks(self.blocks, x, rows=rows, qkv=qkv)

    def projections(
        self, tokens: Tensor, layout: Tensor, mask_token: Tensor, position: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """(B, prefix + L, 3 width): what the first block makes of `fill`'s result, without doing it for every mask token.

        A mask token depends on its position alone: there is a table of them. To fill in y - table at the visible
        patches, with the table as positions, puts y there and the table elsewhere; the gradient of the table is then a sum
        over the batch that `fill` computes anyway.
        """

        def project(x: Tensor) -> Tensor:
            return first.attn.qkv(first.norm1(in_stream_dtype(x.to(dtype)))[0])

        first, count = self.blocks[0], tokens.shape[1]
        table = project((mask_token + position)[None])[0]
        seen = project(tokens + self.places(position, layout, count))
        return self.fill(seen - self.places(table, layout, count), layout, torch.zeros_like(table[0]), table)

    def forward(self, latent: Tensor, layout: Tensor, ids_out: Tensor | None = None) -> Tensor:
        """Decodes.

        Args:
            latent: (B, prefix + K, D) encoder output, class token first.
            layout: which patch each token is of: (B, L) inverse of (ids_keep, ids_masked).
            ids_out: (B, M) patches to predict; None: all L.

        Returns:
            (B, M, out_values), or (B, out_values) if pooled.
        """
        if ids_out is not None and "last" in self.savers:
            return self.pred(self.norm(*self.hidden(latent, layout, ids_out + self.num_prefix))[0])
        x, branch = self.hidden(latent, layout)
        x = branch.added_to(x)[:, self.num_prefix :]
        if self.pool:
            # A vector per image: in float32 it costs nothing, and heads are sensitive to its rounding (heads.py).
            mean = mean_token(self.norm(x)[0])
            with torch.autocast(x.device.type, enabled=False):
                return self.pred(mean)
        return self.pred(self.norm(x if ids_out is None else gather_tokens(x, ids_out))[0])


class TokenDecoder(Decoder):
    """A decoder that predicts a vector for the class token, too: (B, 1 + L, out_values)."""

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        return self.pred(self.norm(*self.hidden(latent, ids_restore))[0])


class PositionDrop(nn.Module):
    """Puts one learned vector in the place of the positions of the first `count` visible tokens.

    The visible tokens come in random order, so these are any. Their number is exact, where MP3's is random: a mean over
    them weighs all images alike.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.vector = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.vector, std=0.02)

    def forward(self, position: Tensor) -> Tensor:
        """(B, K, D) positions -> (B, K, D), what to add to the tokens besides them."""
        swapped = self.vector - position[:, : self.count]
        return F.pad(swapped, (0, 0, 0, position.shape[1] - self.count))


def mean_token(tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, D) in float32 or wider: over many tokens their rounding averages out, a rounded mean's would stay."""
    return tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32))


def inverse(order: Tensor) -> Tensor:
    """(B, L) permutations -> their inverses."""
    count = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, count)


def initialize(module: nn.Module) -> None:
    """Initial weights of encoders and decoders.

    Linear: Xavier uniform (fused qkv as one matrix), bias 0; LayerNorm 1, 0; tokens N(0, 0.02^2); the patch
    embedding's bias keeps the default of the convolution that it stands for.

    Source: facebookresearch/mae models_mae.py `initialize_weights`.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if name == "patch_embed":
                bound = 1 / math.sqrt(part.in_features)
                nn.init.uniform_(part.bias, -bound, bound)
            elif part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_token"):
            nn.init.normal_(parameter, std=0.02)
