"""The ConvMAE encoder: two convolutional stages before the transformer, which see visible patches alone.

Facts: github.com/Alpha-VL/ConvMAE models_convmae.py and vision_transformer.py (arXiv 2205.03892). CMAE's strongest
variant puts it before the same decoders (arXiv 2207.13532); its training code was never published.
"""

from collections.abc import Sequence

import torch
from fastmim_kernels import bias_gelu, depthwise_patches, patchify_gather
from torch import Tensor, nn

from fastmim.blocks import Attend, Block, Branch, GeluLinear, Linear, Norm, Sum, attention, run_blocks
from fastmim.config import SIZES, ConfigError, ModelSpec
from fastmim.recompute import Recomputed, called
from fastmim.vit import sincos_position

# Stage widths of the size that the source ships (base), and of large, those of derivatives of it. The other sizes take a
# third and a half of the width, the first rounded up to a multiple of 16.
STAGE_WIDTHS = {"vit_base": (256, 384), "vit_large": (384, 768)}
STAGE_NORM_EPS = 1e-5
STAGE_BLOCKS = 2


def stage_widths(name: str) -> tuple[int, int]:
    width = SIZES[name].width
    return STAGE_WIDTHS.get(name, (-(-width // 3 // 16) * 16 or 16, width // 2))


class Subdivide(nn.Module):
    """A convolution whose stride is its kernel size, on tokens (B, K, s, s, C): such windows never cross a patch."""

    def __init__(self, side: int, in_width: int, out_width: int):
        super().__init__()
        self.side = side
        self.linear = Linear(side * side * in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, height, width, channels = x.shape
        s = self.side
        x = x.view(batch, count, height // s, s, width // s, s, channels).transpose(3, 4)
        return self.linear(x.reshape(batch, count, height // s, width // s, s * s * channels))


class Spread(nn.Conv2d):
    """Depthwise 5 x 5 convolution over the image, with zeros where no patch is visible: the one step that mixes patches.

    Visible outputs never see masked pixels, as with the source's mask; only visible ones are computed.
    """

    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__(width, width, 5, groups=width)
        self.grid = grid

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        return depthwise_patches(x, ids, self.weight, self.bias, self.grid)


class ConvBlock(Recomputed):
    """x + conv1x1(depthwise(conv1x1(LN x))), then x + MLP(LN x), per pixel of a stage."""

    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__()
        self.norm1 = Norm(width, STAGE_NORM_EPS)
        self.conv1 = Linear(width, width)
        self.spread = Spread(width, grid)
        self.conv2 = Linear(width, width)
        self.norm2 = Norm(width, STAGE_NORM_EPS)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = GeluLinear(4 * width, width)

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        y, _ = self.norm1(x)
        y, x = self.norm2(x, Branch(self.conv2(self.spread(self.conv1(y), ids))))
        return x + self.project(self.fc1(y), self.fc2)


class ConvEncoder(nn.Module):
    """Takes and gives what `vit.Encoder` does, without a class token.

    Stage 1 works on 4 x 4 windows per patch, stage 2 on 2 x 2, stage 3 is the transformer with one block less than
    the plain one; the windows of both stages, merged per patch, are added to its output. All convolutions but the
    depthwise ones keep within a patch and are computed for visible patches alone: the source computes the masked ones,
    too, and drops them.
    """

    num_prefix = 0

    def __init__(self, model: ModelSpec, *, final_norm: bool = True, position: str | None = "column"):
        super().__init__()
        if model.patch_size % 4:
            raise ConfigError(f"--stem conv: expected a patch size divisible by 4, got {model.patch_size}")
        width, depth, heads = SIZES[model.name]
        first, second = stage_widths(model.name)
        self.model, self.width = model, width
        self.design = dict(final_norm=final_norm, position=position)
        self.embed1 = Subdivide(model.patch_size // 4, model.in_chans, first)
        self.embed2 = Subdivide(2, first, second)
        self.embed3 = Subdivide(2, second, width)
        self.norm1 = Norm(first, STAGE_NORM_EPS)
        self.norm2 = Norm(second, STAGE_NORM_EPS)
        self.norm3 = Norm(width, STAGE_NORM_EPS)
        self.stage1 = nn.ModuleList(ConvBlock(first, model.grid) for _ in range(STAGE_BLOCKS))
        self.stage2 = nn.ModuleList(ConvBlock(second, model.grid) for _ in range(STAGE_BLOCKS))
        self.project = Linear(width, width)
        table = sincos_position(width, model.grid, position or "column")[1:]
        self.register_buffer("position", table if position else torch.zeros_like(table), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth - 1))
        self.skip1 = Subdivide(4, first, width)
        self.skip2 = Subdivide(2, second, width)
        self.norm = Norm(width) if final_norm else Sum()
        self._initialize()

    def _initialize(self) -> None:
        """Xavier for the source's linear maps and its last patch convolution; the other convolutions keep the default."""
        linears = [part for block in self.blocks for part in block.modules() if isinstance(part, nn.Linear)]
        for linear in (*linears, self.project):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.embed3.linear.weight)

    def forward(
        self, patches: Tensor, ids: Tensor | None = None, *, attend: Attend | Sequence[Attend] = attention
    ) -> Tensor:
        """(B, K, V) patches and their (B, K) indices (None: all) -> (B, K, D)."""
        side, channels = self.model.patch_size, self.model.in_chans
        x = patches.view(*patches.shape[:2], side, side, channels)
        x = bias_gelu(self.norm1(self.embed1(x))[0])
        for block in self.stage1:
            x = called(block, x, ids)
        skip = self.skip1(x)
        x = bias_gelu(self.norm2(self.embed2(x))[0])
        for block in self.stage2:
            x = called(block, x, ids)
        skip = (skip + self.skip2(x)).flatten(2)
        x = bias_gelu(self.norm3(self.embed3(x))[0]).flatten(2)
        x = self.project(x) + (self.position if ids is None else self.position[ids])
        x, branch = run_blocks(self.blocks, x, attend)
        return self.norm(branch.added_to(x), Branch(skip))[0]

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 images of the model's size -> (B, D): mean over the patch tokens of the whole image."""
        m = self.model
        return self(patchify_gather(images, None, m.patch_size, mean=m.mean, std=m.std)).mean(1)
