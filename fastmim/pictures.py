"""Reconstructions as PNG files."""

from pathlib import Path

import torch
from PIL import Image

from fastmim.targets import Reconstruction

GAP_PX = 4
SMALLEST_PX = 112


def write_pictures(pictures: Reconstruction, path: Path) -> None:
    """One row per image: input, what the encoder sees, reconstruction.

    Images of other than 1 or 3 channels are shown by their first channel, or first three; small ones are enlarged.
    """
    rows = [torch.stack(row) for row in zip(*(p.float().cpu() for p in pictures))]
    grid = torch.stack(rows)
    if grid.shape[2] not in (1, 3):
        grid = grid[:, :, :3] if grid.shape[2] > 3 else grid[:, :, :1]
    zoom = -(-SMALLEST_PX // max(grid.shape[-2:]))
    grid = grid.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    images, columns, channels, height, width = grid.shape
    canvas = torch.ones(channels, images * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX)
    for i in range(images):
        for j in range(columns):
            top, left = i * (height + GAP_PX), j * (width + GAP_PX)
            canvas[:, top : top + height, left : left + width] = grid[i, j]
    pixels = (canvas * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
