"""The contract between a trainer and a loader: what is asked for, what is given, and how errors travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

FILTERS = ("bicubic", "lanczos")


class CropSpec(NamedTuple):
    """One master crop per image: a random box of the source, resized to `size`.

    Source: torchvision RandomResizedCrop for the meaning of scale and ratio; MAE main_pretrain.py for the defaults.
    """

    size: tuple[int, int]
    """(height, width) of the crop, pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area, in (0, 1]."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the box."""
    view: int = 0
    """Crops with the same view number share one box; other numbers draw other boxes."""
    filter: str = "bicubic"
    """How the box is resized: "bicubic" or "lanczos", both with antialiasing."""
    alpha: float = 1.0
    """With boxes: the center is Beta(alpha, alpha) distributed over the sample's box, in (0, 1]; see sampling.crop_box."""
    uses_boxes: bool = False
    """Whether the box is centered inside what `Loader.set_boxes` says of the sample."""


class Batch(NamedTuple):
    """What one rank gets for one step."""

    crops: tuple[Tensor, ...]
    """uint8 (B, C, height, width), contiguous; one per CropSpec, in that order."""
    ids: Tensor
    """int64 (B,): global sample ids, the key of the step's randomness; a substituted image keeps the original's id."""


class Loader(Protocol):
    """An endless, seekable source of batches. The order is a function of (seed, epoch, step, rank) and nothing else."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches start_step .. steps_per_epoch - 1 of one epoch."""
        ...

    def set_boxes(self, boxes: np.ndarray | None) -> None:
        """Where in each image the crops with `uses_boxes` have their centers, from the next call of `epoch` on.

        Iterators given out before end with an error: none mixes old boxes with new ones.

        Args:
            boxes: (N, 4) float32, row = sample id: (top, left, bottom, right) in shares of the image; None: plain crops.
        """
        ...

    def close(self) -> None:
        """Stop workers and free buffers; may be called twice."""
        ...


class DataError(Exception):
    """The data cannot be used. The message names the path and the reason; exit_code is what a program should end with.

    Exit codes: 2 = the folder as a whole is unusable (fix the arguments); 4 = bad images beyond what is allowed.
    """

    def __init__(self, message: str, *, path: str = "", reason: str = "", exit_code: int = 4):
        super().__init__(message)
        self.path, self.reason, self.exit_code = path, reason, exit_code

    def alone(self) -> DataError:
        """Without its traceback, whose frames keep the picture in memory until the garbage collector finds the circle."""
        return DataError(str(self), path=self.path, reason=self.reason, exit_code=self.exit_code)


def printable(path: str) -> str:
    """The path as one harmless line: names with newlines, escapes or broken encoding are shown as Python literals."""
    return path if path.isprintable() else repr(path)


def check_crops(crops: Sequence[CropSpec], in_chans: int) -> tuple[CropSpec, ...]:
    """Validate what a loader is asked for.

    Raises:
        ValueError: no crop; a size below 1; a range that is not 0 < low <= high (scale: <= 1); crops of one view that
            ask for different scale, ratio, alpha or uses_boxes; unknown filter; alpha not in (0, 1]; in_chans below 1.
    """
    if not crops:
        raise ValueError("crops: expected at least one CropSpec, got none.")
    if in_chans < 1:
        raise ValueError(f"in_chans: expected at least 1, got {in_chans}.")
    of_view: dict[int, CropSpec] = {}
    for crop in crops:
        if min(crop.size) < 1:
            raise ValueError(f"CropSpec.size: expected height and width of at least 1, got {crop.size}.")
        if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
            raise ValueError(f"CropSpec.scale: expected 0 < low <= high <= 1, got {crop.scale}.")
        if not 0 < crop.ratio[0] <= crop.ratio[1]:
            raise ValueError(f"CropSpec.ratio: expected 0 < low <= high, got {crop.ratio}.")
        if crop.filter not in FILTERS:
            raise ValueError(f"CropSpec.filter: expected one of {', '.join(FILTERS)}, got {crop.filter!r}.")
        if not 0 < crop.alpha <= 1:
            raise ValueError(f"CropSpec.alpha: expected 0 < alpha <= 1, got {crop.alpha}.")
        first = of_view.setdefault(crop.view, crop)
        for name in ("scale", "ratio", "alpha", "uses_boxes"):
            if getattr(first, name) != getattr(crop, name):
                raise ValueError(
                    f"CropSpec.view: crops of view {crop.view} share one box and so need one {name}, "
                    f"got {getattr(first, name)} and {getattr(crop, name)}; give them other views."
                )
    return tuple(crops)


def check_boxes(boxes: np.ndarray, count: int) -> np.ndarray:
    """A copy of the boxes of `count` samples as float32, which nobody else can change.

    Raises:
        ValueError: another shape, or a box that is not 0 <= top <= bottom <= 1 and 0 <= left <= right <= 1.
    """
    boxes = np.array(boxes, np.float32)
    if boxes.shape != (count, 4):
        raise ValueError(f"boxes: expected shape {(count, 4)}, one row per image, got {boxes.shape}.")
    top, left, bottom, right = boxes.T
    good = (top >= 0) & (bottom >= top) & (bottom <= 1) & (left >= 0) & (right >= left) & (right <= 1)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(
            f"boxes: expected top, left, bottom, right in 0..1 and in order, got {boxes[first].tolist()} for sample {first}."
        )
    return boxes
