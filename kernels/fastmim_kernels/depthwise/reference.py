"""Depthwise convolution on a map that is put together from the patches and taken apart again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autocast


def depthwise_patches(x: Tensor, ids: Tensor | None, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """See the public function."""
    batch, _, s, _, width = x.shape
    h, w = grid
    whole = x
    if ids is not None:
        index = ids[:, :, None, None, None].expand_as(x)
        whole = x.new_zeros(batch, h * w, s, s, width).scatter(1, index, x)
    # Channels last, which is the order of x: one copy.
    image = whole.view(batch, h, w, s, s, width).transpose(2, 3).reshape(batch, h * s, w * s, width).permute(0, 3, 1, 2)
    # Where a CPU does not multiply bfloat16, torch sums its convolutions in it, too: 0.1 in single values of a gradient.
    work = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    with autocast.disabled(x.device):
        image, weight, bias = (t.to(work) for t in (image, weight, bias))
        image = F.conv2d(image, weight, bias, padding=weight.shape[2] // 2, groups=width).to(x.dtype)
    out = image.view(batch, width, h, s, w, s).permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, s, s, width)
    return out if ids is None else out.gather(1, index)
