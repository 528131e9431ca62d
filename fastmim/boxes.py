"""Boxes for crops from a method's own heat maps: where in each training image the object is.

Source: ContrastiveCrop (Peng et al., CVPR 2022, arXiv 2202.03278), github.com/xyupeng/ContrastiveCrop,
DDP_moco_ccrop.py `update_box`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.spec import Loader
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fastmim.compiling import uncompiled
from fastmim.config import ConfigError
from fastmim.dist import broadcast, is_main, world_size
from fastmim.engine.base import Engine
from fastmim.methods.base import Method

BOXES_FILE = "boxes.safetensors"
WHOLE = (0.0, 0.0, 1.0, 1.0)
# A tenth of the largest value counts as heat. Source: box_thresh in every configuration of ContrastiveCrop.
THRESHOLD = 0.1
# Attention is noisy: where a tenth of its peak is nearly everywhere, boxes by threshold say nothing. Then they are the
# smallest with most of the heat, as DINO (arXiv 2104.14294) shows attention: by 60 % of its mass. Own choice: the source
# has no transformer.
CROWDED_AREA, MASS = 0.95, 0.6


def threshold_boxes(heat: Tensor, size: tuple[int, int], threshold: float = THRESHOLD) -> Tensor:
    """The first and last row and column of the upsampled heat map that hold more than a share of its peak.

    Args:
        heat: (B, h, w) floats, of any scale: each map is stretched to 0 .. 1 first.
        size: (height, width) of the image in pixels.

    Returns:
        (B, 4) float32: top, left, bottom, right in shares of the image; the whole image for a constant map.
    """
    stretched, is_flat = _stretch(heat)
    pixels = F.interpolate(stretched[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    first, last = [], []
    for axis, side in ((2, size[0]), (1, size[1])):
        is_warm = (pixels.amax(axis) > threshold).int()
        first.append(is_warm.argmax(1) / side)
        last.append((side - 1 - is_warm.flip(1).argmax(1)) / side)
    return _or_whole(torch.stack(first + last, dim=1), is_flat)


def mass_boxes(heat: Tensor, mass: float = MASS) -> Tensor:
    """The smallest box of whole cells with at least a share of the heat; of equal ones the first by top, bottom, left.

    Args:
        heat: (B, h, w) floats, of any scale: each map is stretched to 0 .. 1 first.

    Returns:
        (B, 4) float32: top, left, bottom, right in shares of the image; the whole image for a constant map.
    """
    stretched, is_flat = _stretch(heat)
    _, h, w = heat.shape
    # A margin against rounding: a box with exactly the share must count.
    wanted = (mass - 1e-6) * stretched.sum((1, 2), dtype=torch.float64)
    above = F.pad(stretched.double().cumsum(1).cumsum(2), (1, 0, 1, 0))  # heat above and left of each corner
    top, bottom = torch.triu_indices(h, h, device=heat.device)
    strips = (above[:, bottom + 1] - above[:, top]).contiguous()  # (B, pairs of rows, 1 + w) running sums over columns
    # For each left edge, the first right edge that has enough; w + 1 where there is none.
    right = torch.searchsorted(strips, strips[..., :-1] + wanted[:, None, None])
    left = torch.arange(w, device=heat.device)
    area = (bottom + 1 - top)[:, None] * (right - left)
    best = torch.where(right <= w, area, h * w + 1).flatten(1).argmin(1)
    pair, left = best // w, best % w
    right = right.flatten(1).gather(1, best[:, None])[:, 0]
    return _or_whole(torch.stack([top[pair] / h, left / w, (bottom[pair] + 1) / h, right / w], dim=1), is_flat)


def _stretch(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Maps stretched to 0 .. 1, and (B,) bool: which are constant (or not numbers) and became 0."""
    heat = heat.float()
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    is_flat = ~(high > low)
    return torch.where(is_flat, 0.0, (heat - low) / torch.where(is_flat, 1.0, high - low)), is_flat.flatten()


def _or_whole(boxes: Tensor, is_flat: Tensor) -> Tensor:
    return torch.where(is_flat[:, None], boxes.new_tensor(WHOLE), boxes)


def area(boxes: Tensor) -> Tensor:
    """(N, 4) -> (N,) shares of the image."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@torch.no_grad()
def find_boxes(
    heat_map: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    count: int,
    size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, str]:
    """Boxes of all images, on every rank, from the heat maps of this rank's share of them.

    Args:
        heat_map: uint8 images (B, C, H, W) -> (B, h, w).
        batches: (images, labels, ids) of this rank's share.
        count: images of all ranks. One that no rank has, being unreadable, gets the whole image.
        size: (height, width) of the images.

    Returns:
        (count, 4) float32, and the rule that they follow.
    """
    # Thresholds, masses, and whether there are any: which of the two rules holds is known after the last image only.
    found = torch.zeros(count, 9, device=device)
    for images, _, ids in batches:
        heat = heat_map(images.to(device, non_blocking=True))
        boxes = torch.cat([threshold_boxes(heat, size), mass_boxes(heat)], dim=1)
        found[ids.to(device)] = F.pad(boxes, (0, 1), value=1.0)
    if world_size() > 1:
        torch.distributed.all_reduce(found)  # the others have 0 in my rows
    by_threshold, by_mass = (_or_whole(part, found[:, 8] == 0) for part in (found[:, :4], found[:, 4:8]))
    largest = (1 - 1 / size[0]) * (1 - 1 / size[1])  # of a box that ends with the last pixel
    if area(by_threshold).mean() > CROWDED_AREA * largest:
        return by_mass, f"the smallest with {100 * MASS:.0f} % of the heat"
    return by_threshold, f"what is over {100 * THRESHOLD:.0f} % of the peak"


def update_steps(shares: Iterable[float], total: int, steps_per_epoch: int) -> list[int]:
    """Steps of the epoch starts nearest to the given shares of a run of `total` steps; none at its start or end."""
    steps = {round(share * total / steps_per_epoch) * steps_per_epoch for share in shares}
    return sorted(step for step in steps if 0 < step < total)


def write_boxes(folder: Path, boxes: np.ndarray) -> None:
    save_file({"boxes": boxes}, folder / BOXES_FILE)


def read_boxes(folder: Path) -> np.ndarray | None:
    """What `write_boxes` wrote; None where it did not."""
    path = folder / BOXES_FILE
    return load_file(path)["boxes"] if path.exists() else None


class HeatBoxes:
    """Gives a loader the method's first box for all images, and at some epoch starts new ones from heat maps.

    The boxes of a batch follow from its step: they are those of the last update at or before it. A checkpoint of step
    s holds the boxes of the batch before s: where an update is due at s, a run that resumes there makes it again, from
    the same weights.

    Args:
        method: `first_box`, `box_updates` and `heat_map` are used.
        engine, loader: of the run.
        reader: gives this rank's share of the training images, each whole.
        count: training images.
        total: steps of the run.
        say: where to report an update.
    """

    def __init__(
        self,
        method: Method,
        engine: Engine,
        loader: Loader,
        reader: EvalReader,
        *,
        count: int,
        total: int,
        say: Callable[[str], None],
    ):
        self.method, self.engine, self.loader, self.reader = method, engine, loader, reader
        self.count, self.say = count, say
        self.steps = update_steps(method.box_updates, total, loader.steps_per_epoch)
        self.found: np.ndarray | None = None
        self.area: float | None = None
        self.given: np.ndarray | None = None
        """What the loader has."""
        self.is_given = False

    def prepare(self, step: int) -> None:
        """Sees to it that the loader has the boxes for the batch that follows `step` steps; collective."""
        if step in self.steps:
            self._update(step)
        if not self.is_given:
            boxes = self.found
            if boxes is None and self.method.first_box is not None:
                boxes = np.tile(np.float32(self.method.first_box), (self.count, 1))
            self.loader.set_boxes(boxes)
            self.given = boxes
            self.area = None if boxes is None else area(torch.from_numpy(boxes)).mean().item()
            self.is_given = True

    def _update(self, step: int) -> None:
        with self.engine.whole(), self.engine.autocast(), uncompiled():
            size = self.method.model.image_size
            boxes, rule = find_boxes(self.method.heat_map, self.reader, self.count, size, self.engine.device)
        self.found, self.is_given = boxes.cpu().numpy(), False
        mean = area(boxes).mean().item()
        self.say(f"boxes     step {step}: from heat maps, {100 * mean:.0f} % of the image on average: {rule}")

    def values(self) -> dict[str, float]:
        """What to log."""
        return {} if self.area is None else {"box_area": self.area}

    def save(self, folder: Path) -> None:
        """Writes the boxes from heat maps, if there are any yet."""
        if self.found is not None:
            write_boxes(folder, self.found)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, on rank 0: the others need not see the folder. Collective."""
        self.is_given, path, device = False, folder / BOXES_FILE, self.engine.device
        stored = read_boxes(folder) if is_main() else None
        found = torch.empty(0, 4) if stored is None else torch.from_numpy(stored)
        count = int(broadcast(torch.tensor(len(found), device=device)))
        if count not in (0, self.count):
            raise ConfigError(
                f"--resume: {path} has boxes of {count} images, --data has {self.count}; "
                f"use the same data, or start anew with another --out"
            )
        shared = found.to(device) if is_main() else torch.empty(count, 4, device=device)
        self.found = broadcast(shared).cpu().numpy() if count else None
