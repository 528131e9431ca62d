"""Center crops with labels, in the order of the index: what k-NN, probes and feature export read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .decode import CropReader
from .index import FolderIndex, ImageIndex
from .loader import BadImage, OnBadImage, check_damage
from .sampling import center_box
from .spec import DataError, printable
from .workers import answers_of, parallelism


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
        in_chans, workers, threads, pin_memory, timeout_s: as for CropLoader.
        limit: use this many images only, spread evenly over the index.
        size_ratio: side of the box by the short side of the image. Source: 224 of 256, the ImageNet protocol.
            None: the whole image, whose aspect becomes that of `size`.
        on_bad_image: "error" stops; "skip" leaves the image out.
    Attributes:
        bad_images: (path, reason) of images left out, without repeats.
        workers, threads, reason: as for CropLoader.
    Raises:
        DataError: an unusable folder (from the constructor) or image (from the iterator).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | ImageIndex,
        size: tuple[int, int],
        *,
        batch_size: int = 64,
        rank: int = 0,
        world: int = 1,
        in_chans: int = 3,
        limit: int | None = None,
        workers: int | None = 0,
        threads: int | None = None,
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
        self.index = FolderIndex(folder) if isinstance(folder, str | os.PathLike) else folder
        self.ids = np.array_split(spread(len(self.index), limit), world)[rank]
        self._skips, self._pin_memory, self._timeout_s = on_bad_image == "skip", pin_memory, timeout_s
        self.bad_images = check_damage(self.index, self._skips)
        reader = CropReader([(size, "bicubic")], in_chans)
        self.reason = reader.reason
        self._dataset = _CenterDataset(self.index, size, reader, size_ratio)
        self._requests = [self.ids[start : start + batch_size] for start in range(0, len(self.ids), batch_size)]
        self._batch_bytes = batch_size * in_chans * size[0] * size[1]
        self.workers, self.threads = parallelism(workers, threads, reader, world, pin_memory, self._batch_bytes)
        self.workers = min(self.workers, len(self._requests))

    def __iter__(self) -> Iterator[EvalBatch]:
        answers = answers_of(
            self._dataset,
            self._requests,
            workers=self.workers,
            threads=self.threads,
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

    def __init__(self, index: ImageIndex, size: tuple[int, int], reader: CropReader, size_ratio: float | None):
        self.index, self.size, self.reader, self.size_ratio = index, size, reader, size_ratio
        self.pins = False

    def __getitem__(self, ids: np.ndarray) -> tuple[EvalBatch, list[BadImage]]:
        def boxes_of(slot: int, width: int, height: int) -> list[tuple[float, float, float, float]]:
            if self.size_ratio is None:
                return [(0, 0, width, height)]
            return [center_box(width, height, self.size_ratio, aspect=self.size[1] / self.size[0])]

        shape = (len(ids), self.reader.in_chans, *self.size)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pins)
        names = [self.index.path(sample_id) for sample_id in ids.tolist()]
        errors = self.reader.read(self.index.encoded(ids.tolist()), names, boxes_of, [images])
        bad = [BadImage(int(i), error.path, error.reason) for i, error in zip(ids, errors) if error is not None]
        if bad:
            good = np.array([error is None for error in errors])
            images, ids = images[torch.from_numpy(good)], ids[good]
        labels = self.index.labels[ids] if self.index.labels is not None else np.full(len(ids), -1, np.int64)
        return EvalBatch(images, torch.from_numpy(labels), torch.from_numpy(ids.copy())), bad
