"""Projection heads of contrastive methods, with batch normalization over the global batch."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmim.dist import differentiable_mean


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


class ProjectionHead(nn.Sequential):
    """Linear (with bias) - SyncBN - ReLU - Linear (no bias).

    Source: ZhichengHuang/CMAE necks NonLinearNeck; linear layers keep torch's default initialization.
    """

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__(
            nn.Linear(width, hidden), SyncBatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out, bias=False)
        )


class NormalizedHead(nn.Sequential):
    """Linear maps without bias, each followed by SyncBN, ReLU between them; the last SyncBN has no weight and bias.

    Args:
        widths: of the input, of the hidden layers, of the output.

    Source: facebookresearch/moco-v3 moco/builder.py `_build_mlp`; eps and initialization are torch's.
    """

    def __init__(self, *widths: int):
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(widths)):
            is_last = i == len(widths) - 2
            layers += [nn.Linear(width, out, bias=False), SyncBatchNorm(out, eps=1e-5, affine=not is_last)]
            layers += [] if is_last else [nn.ReLU(inplace=True)]
        super().__init__(*layers)
