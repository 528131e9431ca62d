"""Projection heads of contrastive methods, with batch normalization over the global batch."""

import torch
from torch import Tensor, nn

from fastmim.dist import differentiable_mean


class SyncBatchNorm(nn.Module):
    """BatchNorm of (B, D) features with the statistics of all ranks' batches, on any device.

    torch's own SyncBatchNorm refuses CPUs. There are no running statistics: the heads exist only in training.
    Statistics are fp32; the variance is biased, as in normalization during training everywhere.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        mean = _global_mean(x)
        centered = x - mean
        return centered * torch.rsqrt(_global_mean(centered * centered) + self.eps) * self.weight + self.bias


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
