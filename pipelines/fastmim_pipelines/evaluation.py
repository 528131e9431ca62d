"""Center crops with labels, in the order of the index: what k-NN, probes and feature export read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cores import default_workers
from .decode import read_picture
from .folder import BadImage, OnBadImage
from .index import FolderIndex
from .sampling import center_box
from .spec import DataError, printable
from .workers import Answers, most_workers


class EvalBatch(NamedTuple):
    images: Tensor
    """uint8 (B, C, height, width)."""
    labels: Tensor
    """int64 (B,): index into the classes of the folder index; -1 where images carry no label."""
    ids: Tensor
    """int64 (B,): position in the folder index."""


class EvalReader:
    """One rank's share of a folder's images, each once, at the center box. Iterate as often as needed.

    Args:
        folder: path, or an index that is there already.
        size: (height, width) of the pictures.
        batch_size: pictures per batch of this rank; the last batch may be smaller.
        rank, world: ranks take contiguous parts, whose sizes differ by at most one.
        in_chans, workers, pin_memory, timeout_s: as for FolderLoader.
        limit: use this many images only, spread evenly over the index.
        size_ratio: side of the box by the short side of the image. Source: 224 of 256, the ImageNet protocol.
            None: the whole image, whose aspect becomes that of `size`.
        on_bad_image: "error" stops; "skip" leaves the image out.
    Attributes:
        bad_images: (path, reason) of images left out, without repeats.
    Raises:
        DataError: an unusable folder (from the constructor) or image (from the iterator).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | FolderIndex,
        size: tuple[int, int],
        *,
        batch_size: int = 64,
        rank: int = 0,
        world: int = 1,
        in_chans: int = 3,
        limit: int | None = None,
        workers: int | None = 0,
        size_ratio: float | None = 224 / 256,
        on_bad_image: OnBadImage = "error",
        pin_memory: bool = False,
        timeout_s: float = 300,
    ):
        for name, value in (("batch_size", batch_size), ("limit", limit), ("size", min(size)), ("in_chans", in_chans)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}.")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0..{world - 1}, got {rank}.")
        self.index = folder if isinstance(folder, FolderIndex) else FolderIndex(folder)
        self.ids = np.array_split(spread(len(self.index), limit), world)[rank]
        self.bad_images: list[tuple[str, str]] = []
        self._dataset = _CenterDataset(self.index, size, in_chans, size_ratio)
        self._requests = [self.ids[start : start + batch_size] for start in range(0, len(self.ids), batch_size)]
        self._batch_bytes = batch_size * in_chans * size[0] * size[1]
        if workers is None:
            cores = default_workers(world, trains_on_cpu=not pin_memory)
            workers = int(min(cores, most_workers(self._batch_bytes)))
        self.workers = min(workers, len(self._requests))
        self._skips, self._pin_memory, self._timeout_s = on_bad_image == "skip", pin_memory, timeout_s

    def __iter__(self) -> Iterator[EvalBatch]:
        answers = Answers(
            self._dataset,
            self._requests,
            workers=self.workers,
            result_bytes=self._batch_bytes,
            pin_memory=self._pin_memory,
            timeout_s=self._timeout_s,
        )
        try:
            for batch, bad in answers:
                for image in bad:
                    if not self._skips:
                        raise DataError(
                            f"{printable(image.path)}: {image.reason} (sample {image.sample_id}); repair or "
                            "remove the file, or go on without it: --on-bad-image skip.",
                            path=image.path,
                            reason=image.reason,
                        )
                    if (image.path, image.reason) not in self.bad_images:
                        self.bad_images.append((image.path, image.reason))
                if len(batch.ids):
                    yield batch
        finally:
            answers.close()


def spread(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of 0..count-1, evenly spread and ascending: int64 (min(limit, count),)."""
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * count // limit


class _CenterDataset(Dataset):
    """Sample ids -> (EvalBatch, bad images); runs in the workers."""

    def __init__(self, index: FolderIndex, size: tuple[int, int], in_chans: int, size_ratio: float | None):
        self.index, self.size, self.in_chans, self.size_ratio = index, size, in_chans, size_ratio

    def __getitem__(self, ids: Sequence[int]) -> tuple[EvalBatch, list[BadImage]]:
        images: list[np.ndarray] = []
        good: list[int] = []
        bad: list[BadImage] = []
        height, width = self.size
        for sample_id in map(int, ids):
            try:
                picture = read_picture(self.index.path(sample_id), self.in_chans)
            except DataError as e:
                bad.append(BadImage(sample_id, e.path, e.reason))
                continue
            if self.size_ratio is None:
                box = (0, 0, picture.width, picture.height)
            else:
                box = center_box(picture.width, picture.height, self.size_ratio, aspect=width / height)
            images.append(picture.crop(box, self.size))
            good.append(sample_id)
        pixels = np.stack(images) if images else np.empty((0, self.in_chans, height, width), np.uint8)
        ids_array = np.array(good, dtype=np.int64)
        labels = self.index.labels[ids_array] if self.index.labels is not None else np.full(len(good), -1, np.int64)
        return EvalBatch(*map(torch.from_numpy, (pixels, labels, ids_array))), bad
