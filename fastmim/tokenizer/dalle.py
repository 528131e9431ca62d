"""The encoder of DALL-E's discrete VAE, whose tokens BEiT and CAE predict.

Facts: openai/DALL-E dall_e/encoder.py and dall_e/utils.py; parameters have the names of the published weights.
"""

from functools import partial

import torch
from fastmim_kernels import gather_tokens
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 4
# Pixels lie in 0.1 .. 0.9 for the network. Source: dall_e/utils.py `map_pixels`, eps 0.1.
PIXEL_SCALE, PIXEL_SHIFT = 0.8, 0.1
# Cells whose scores of all tokens exist at once: 128 MiB at 8192 tokens, twice in `linear_of_halves`.
CELLS_AT_ONCE = 4096
# What float16 leaves over of a weight is too small for it unless it grows by this.
GROWTH = 2.0**11


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 below 65504 -> float16 (high, low) with weight = high + low / GROWTH, to 2^-22 of itself or to 2^-36."""
    high = weight.half()
    return high, ((weight - high.float()) * GROWTH).half()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(n, k) and (m, k) float16 -> (n, m) float32: products of float16 are exact in float32, in which they are added up.

    The matrix units of a GPU cut sums off where others round them.
    """
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def linear_of_halves(x: Tensor, high: Tensor, low: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` of float16 (n, k) with float32 weights (m, k), given as `halves`, and bias (m,), in float32.

    A GPU multiplies float16 more than ten times as fast as float32.
    """
    return product(x, high).add_(product(x, low), alpha=1 / GROWTH).add_(bias)


class Convolution(nn.Module):
    """A convolution of odd side that keeps the image's size; computes in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, side: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w.to(x.dtype), self.b.to(x.dtype), padding=self.w.shape[-1] // 2)


class EncoderBlock(nn.Module):
    """x + gain * (relu, conv) x 4; three 3 x 3 convolutions of a quarter of the width, then a 1 x 1 one."""

    def __init__(self, inputs: int, outputs: int, gain: float):
        super().__init__()
        hidden = outputs // 4
        self.gain = gain
        self.id_path = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = nn.ModuleDict(
            {
                "conv_1": Convolution(inputs, hidden, 3),
                "conv_2": Convolution(hidden, hidden, 3),
                "conv_3": Convolution(hidden, hidden, 3),
                "conv_4": Convolution(hidden, outputs, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """May write its result to the memory of x."""
        *hidden, last = self.res_path.values()
        branch = x
        for convolution in hidden:
            branch = convolution(F.relu(branch))
        # The 1 x 1 convolution as a product that is added to the other path: one pass over the images instead of four.
        total, weight = _rows(self.id_path(x)), last.w.flatten(1).to(x.dtype)
        total.addmm_(_rows(F.relu(branch)), weight.T, alpha=self.gain).add_(self.gain * last.b.to(x.dtype))
        return total.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), a view where the channels lie together."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class DalleEncoder(nn.Module):
    """Images -> token ids, one per 8 x 8 pixels. Weights are random; `load_dalle` gives the published ones.

    As in the source, all layers but the last compute in float16 on GPUs, in float32 elsewhere; the last one always has
    the digits of float32. Every autocast is off inside: lower precision flips ids.

    Args:
        channels, width, blocks_per_group, vocabulary: of the published network by default, with 53.8 M parameters.
    """

    stride = 2 ** (GROUPS - 1)
    """Pixels per token and side: each group but the last ends in a 2 x 2 maximum."""

    def __init__(self, channels: int = 3, width: int = 256, blocks_per_group: int = 2, vocabulary: int = 8192):
        super().__init__()
        self.channels, self.vocabulary = channels, vocabulary
        gain = 1 / (GROUPS * blocks_per_group) ** 2
        layers: dict[str, nn.Module] = {"input": Convolution(channels, width, 7)}
        inputs = width
        for group in range(GROUPS):
            outputs = width * 2**group
            blocks = {}
            for i in range(blocks_per_group):
                blocks[f"block_{i + 1}"] = EncoderBlock(inputs, outputs, gain)
                inputs = outputs
            layers[f"group_{group + 1}"] = nn.ModuleDict(blocks)
        layers["output"] = nn.ModuleDict({"conv": Convolution(inputs, vocabulary, 1)})
        self.blocks = nn.ModuleDict(layers)
        self.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, 8 * width, H / 8, W / 8), before the last layer."""
        x = (images.float() * PIXEL_SCALE + PIXEL_SHIFT).to(memory_format=torch.channels_last)
        x = x.half() if x.is_cuda else x
        x = self.blocks["input"](x)
        for group in range(GROUPS):
            for block in self.blocks[f"group_{group + 1}"].values():
                x = block(x)
            if group < GROUPS - 1:
                x = F.max_pool2d(x, 2)
        return F.relu(x)

    @torch.no_grad()
    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Token ids.

        Args:
            images: (B, C, H, W) float32 in [0, 1], H and W multiples of 8.
            ids: (B, M) int64, the cells wanted, in raster order 0 .. H / 8 * W / 8 - 1; None: all.

        Returns:
            (B, M) int64 in 0 .. vocabulary - 1.
        """
        with torch.autocast(images.device.type, enabled=False):
            cells = self.features(images).flatten(2).transpose(1, 2)
            if ids is not None:
                # The last layer is a tenth of the work: only where it is asked for.
                cells = gather_tokens(cells, ids)
            last = self.blocks["output"]["conv"]
            weight, bias = last.w.flatten(1).float(), last.b.float()
            if cells.dtype == torch.float16:
                high, low = halves(weight)
                scores = partial(linear_of_halves, high=high, low=low, bias=bias)
            else:
                scores = partial(F.linear, weight=weight, bias=bias)
            rows = cells.reshape(-1, cells.shape[-1]).split(CELLS_AT_ONCE)
            best = [scores(row).argmax(1) for row in rows]
        return torch.cat(best).view(cells.shape[:2])
