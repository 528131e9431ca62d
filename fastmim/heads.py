"""Heads: projections of contrastive methods, with batch normalization over the global batch, and ICMAE's own two."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmim.config import ConfigError
from fastmim.dist import differentiable_mean
from fastmim.vit import Block, initialize, run_blocks


class SyncBatchNorm(nn.Module):
    """BatchNorm of (B, D) features with the statistics of all ranks' batches, on any device.

    torch's own SyncBatchNorm refuses CPUs. There are no running statistics: the heads exist only in training.
    Statistics are fp32; the variance is biased, as in normalization during training everywhere.
    """

    def __init__(self, width: int, eps: float = 1e-6, *, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        mean = _global_mean(x)
        centered = x - mean
        normalized = centered * torch.rsqrt(_global_mean(centered * centered) + self.eps)
        return normalized if self.weight is None else normalized * self.weight + self.bias


def _global_mean(x: Tensor) -> Tensor:
    """Mean over the rows of all ranks (equal numbers of rows), differentiable."""
    return differentiable_mean(x.mean(0))


def _check_widths(*widths: int) -> None:
    if min(widths) < 1:
        raise ConfigError(f"head_hidden, head_out: expected at least 1 channel, got {min(widths)}")


class Head(nn.Sequential):
    """Layers on one vector per image, in float32 under autocast, too.

    Images differ by little, batch norm makes that large, and ReLU then decides by its sign: what bfloat16 rounds here
    turns a gradient on or off. In float32 the layers cost as little, being a thousandth of a step.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class ProjectionHead(Head):
    """Linear (with bias) - SyncBN - ReLU - Linear (no bias).

    Source: ZhichengHuang/CMAE necks NonLinearNeck; linear layers keep torch's default initialization.
    """

    def __init__(self, width: int, hidden: int, out: int):
        _check_widths(hidden, out)
        super().__init__(
            nn.Linear(width, hidden), SyncBatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out, bias=False)
        )


class NormalizedHead(Head):
    """Linear maps without bias, each followed by SyncBN, ReLU between them; the last SyncBN has no weight and bias.

    Args:
        widths: of the input, of the hidden layers, of the output.

    Source: facebookresearch/moco-v3 moco/builder.py `_build_mlp`; eps and initialization are torch's.
    """

    def __init__(self, *widths: int):
        _check_widths(*widths)
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(widths)):
            is_last = i == len(widths) - 2
            layers += [nn.Linear(width, out, bias=False), SyncBatchNorm(out, eps=1e-5, affine=not is_last)]
            layers += [] if is_last else [nn.ReLU(inplace=True)]
        super().__init__(*layers)


class ClassBlocks(nn.Module):
    """Transformer blocks over (B, N, D) tokens, of which the first remains: (B, D). Source: SDMAE code, base_ctr."""

    def __init__(self, width: int, heads: int, depth: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x, branch = run_blocks(self.blocks, x)
        return branch._replace(x=branch.x[:, :1]).added_to(x[:, :1])[:, 0]


class PositionHead(nn.Sequential):
    """Two linear maps with nothing between: (B, n, D) -> (B, n, L) logits. Source: SDMAE code.

    Weights are N(0, 0.02^2), so that the cross entropy starts at ln L. Own choice, after timm.
    """

    def __init__(self, width: int, num_patches: int):
        super().__init__(nn.Linear(width, width // 2), nn.Linear(width // 2, num_patches))
        for part in self:
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
