"""Vision transformer parts: position table, attention, blocks, encoder, light decoder.

They know nothing of masking policy: who is visible arrives as patch indices.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from fastmim_kernels import (
    Stream,
    add_layer_norm,
    bias_gelu,
    gather_tokens,
    linear,
    patchify_gather,
    qkv_attention,
    restore_tokens,
    uniform,
)
from fastmim_kernels.qkv import attention
from torch import Tensor, nn

from fastmim.config import SIZES, ModelSpec

NORM_EPS = 1e-6


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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A linear layer whose weight gradient is summed in float32 on CPUs, too."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class QueryValueBias(nn.Linear):
    """The fused qkv product whose keys have no bias: softmax cancels it. Source: microsoft/unilm beit."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width) if key_bias else QueryValueBias(width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, attend: Attend = attention) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, x.shape[2] // self.heads))
        if attend is attention:
            return self.proj(qkv_attention(qkv).flatten(2))
        return self.proj(attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2))


class Norm(nn.LayerNorm):
    """LayerNorm behind a residual addition: both in one pass over the tokens."""

    def __init__(self, width: int, eps: float = NORM_EPS):
        super().__init__(width, eps=eps)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, scale: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adds a branch and normalizes.

        Args:
            x: (B, N, D) residual stream.
            branch: (B, N, D) what to add to it; None: nothing.
            scale, rows: (D,) and (B,) factors of the branch, or None.

        Returns:
            The normalized sum, and the sum.
        """
        if branch is None:
            return add_layer_norm(x, None, self.weight, self.bias, eps=self.eps), x
        return add_layer_norm(
            branch, x, self.weight, self.bias, scale=scale, row_scale=rows, eps=self.eps, prenorm=True
        )


class Sum(nn.Module):
    """A `Norm` that does not normalize."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        return x, x


class Block(nn.Module):
    """Pre-norm transformer block with an MLP of ratio 4 and exact GELU.

    Args:
        layer_scale: start of the learned factors of both branches, one per channel; 0: none.
        key_bias: see `QueryValueBias`.
    """

    def __init__(self, width: int, heads: int, *, layer_scale: float = 0.0, key_bias: bool = True):
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads, key_bias=key_bias)
        self.norm2 = Norm(width)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None
            self.register_parameter(name, gamma)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, attend: Attend = attention, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One block, its last addition left to who comes next: the next block's first norm adds and normalizes at once.

        Args:
            x: (B, N, D) residual stream.
            branch: (B, N, D) what the block before left to be added, or None.
            attend: the attention.
            drop: (B, 2) factors of the two branches, 0 where stochastic depth leaves one out.

        Returns:
            The stream, and what is to be added to it.
        """
        y, x = self.norm1(x, branch)
        y, x = self.norm2(x, self.attn(y, attend), self.gamma_1, None if drop is None else drop[:, 0])
        return x, scaled(self.fc2(bias_gelu(self.fc1(y))), self.gamma_2, drop, 1)


def run_blocks(
    blocks: Iterable[Block],
    x: Tensor,
    attend: Attend | Sequence[Attend] = attention,
    drop: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs at least one block after another.

    Under autocast to bf16 the residual stream is bf16, too; sums and norms are computed in fp32.

    Args:
        blocks: of width D.
        x: (B, N, D).
        attend: the attention of all blocks, or one per block.
        drop: (B, depth, 2), see `random_drop_path`.

    Returns:
        The residual stream, and the last branch, which is still to be added to it.
    """
    device, branch = x.device.type, None
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        x = x.bfloat16()
    for i, block in enumerate(blocks):
        x, branch = block(x, branch, attend if callable(attend) else attend[i], None if drop is None else drop[:, i])
    return x, branch


def scaled(branch: Tensor, gamma: Tensor | None, drop: Tensor | None, column: int) -> Tensor:
    """A residual branch (B, N, D) times its layer scale (D,) and its image's column of `drop` (B, 2)."""
    if gamma is not None:
        branch = branch * gamma
    return branch if drop is None else branch * drop[:, column].to(branch.dtype).view(-1, 1, 1)


def random_drop_path(rng: Tensor, ids: Tensor, peak: float, *depths: int) -> list[Tensor]:
    """Stochastic depth: factors (B, depth, 2) of the branches of the blocks, for networks of the given depths.

    In each network the drop rate rises linearly from 0 at its first block to `peak` at its last. A branch survives
    with probability 1 - rate, and is then divided by it. Source: arXiv 1603.09382; timm's scaling.
    """
    rate = torch.cat([torch.linspace(0, peak, depth, device=ids.device) for depth in depths]).repeat_interleave(2)
    survives = uniform(rng, ids, Stream.DROP_PATH, len(rate)) >= rate
    factors = (survives / (1 - rate)).view(len(ids), -1, 2)
    return list(factors.split(list(depths), dim=1))


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
        attend: Attend | Sequence[Attend] = attention,
        drop: Tensor | None = None,
    ) -> Tensor:
        """Encodes.

        Args:
            patches: (B, K, V).
            ids: (B, K) their indices in the grid; None: all, in raster order.
            extra: added to the patch tokens, broadcasts against (B, K, D).
            attend: the attention of all blocks, or one per block.
            drop: (B, depth, 2), see `random_drop_path`.

        Returns:
            (B, 1 + K, D), class token first.
        """
        x = self.embed(patches, ids)
        if self.design["position"]:
            x = x + (self.position[1:] if ids is None else self.position[1:][ids])
        if extra is not None:
            x = x + extra
        cls = (self.cls_token + self.position[0]).expand(len(x), 1, -1)
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
        self.pool, self.num_prefix = pool, num_prefix
        self.embed = Linear(SIZES[model.name].width, spec.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.register_buffer("position", sincos_position(spec.width, model.grid, position), persistent=False)
        self.blocks = nn.ModuleList(Block(spec.width, spec.heads) for _ in range(spec.depth))
        self.norm = Norm(spec.width)
        self.pred = Linear(spec.width, out_values)
        initialize(self)

    def fill(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """Embedded visible tokens -> all tokens with their positions. For subclasses whose images are laid out else."""
        position = self.position[1 - self.num_prefix :]
        return restore_tokens(tokens, self.mask_token.flatten(), position, ids_restore, num_prefix=self.num_prefix)

    def hidden(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(B, prefix + K, D) encoder output -> (B, prefix + L, width), before the last norm."""
        x, branch = run_blocks(self.blocks, self.fill(self.embed(latent), ids_restore))
        return x + branch

    def forward(self, latent: Tensor, ids_restore: Tensor, ids_out: Tensor | None = None) -> Tensor:
        """Decodes.

        Args:
            latent: (B, prefix + K, D) encoder output, class token first.
            ids_restore: (B, L) inverse of (ids_keep, ids_masked).
            ids_out: (B, M) patches to predict; None: all L.

        Returns:
            (B, M, out_values), or (B, out_values) if pooled.
        """
        x = self.hidden(latent, ids_restore)[:, self.num_prefix :]
        if self.pool:
            return self.pred(self.norm(x)[0].mean(1))
        return self.pred(self.norm(x if ids_out is None else gather_tokens(x, ids_out))[0])


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
