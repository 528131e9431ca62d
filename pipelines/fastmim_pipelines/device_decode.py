"""What the decoders of other libraries have in common: they take plain JPEG files, and Pillow takes the rest.

Their pixels are not Pillow's: each has its own inverse transform and resampler, and cuts the box out before it resizes,
so that nothing beside the box has a weight. Measured on CPUs against Pillow, see tests/pipelines/test_pipeline_device.py.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import Box, read_bytes, read_picture
from .index import ImageIndex, open_index
from .loader import CropLoader
from .native_decode import Encoded, load
from .spec import Batch, CropSpec, DataError

_TAIL = 1 << 16  # bytes behind an image that are tolerated
_END = b"\xff\xd9"


def import_or_advise(module: str, package: str, name: str) -> ModuleType:
    """Raises ModuleNotFoundError with the command that installs the package."""
    try:
        return import_module(module)
    except ImportError as e:
        raise ModuleNotFoundError(
            f"loader: {name} needs {package}, which does not import ({e}); pip install {package}"
        ) from e


class DeviceReader(ABC):
    """The same interface as CropReader, for a decoder that fills tensors on a device.

    Args:
        crops: (height, width) and filter of each crop; bicubic alone.
        in_chans: 3.
    Attributes:
        device: where the crops are.
        reason: one line that says what decodes.
    Raises:
        ValueError: another filter or number of channels.
    """

    name: str
    uses_native = True  # no worker processes by default: they could not use the GPU
    threads = 1

    def __init__(self, crops: Sequence[tuple[tuple[int, int], str]], in_chans: int):
        others = {filter for _, filter in crops} - {"bicubic"}
        if others or in_chans != 3:
            asked = f"{', '.join(sorted(others))} and " if others else ""
            raise ValueError(f"loader: {self.name} has bicubic crops of 3 channels, got {asked}{in_chans}; use folder.")
        self.crops, self.in_chans = list(crops), in_chans
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # that of the thread that uses it
        self.reason = f"{self.name} decodes on {self.device.type}"

    @abstractmethod
    def decode(self, datas: list[np.ndarray], boxes: list[tuple[int, int, int, int]], sizes: list[tuple[int, int]]):
        """The box of each file resized to each size. Runs on `device`, on torch's current stream.

        Returns: per size a list with, for each file, uint8 (3, height, width), or None if it cannot be decoded.
        """

    def read(
        self,
        images: Sequence[Encoded],
        names: Sequence[str],
        boxes_of: Callable[[int, int, int], Sequence[Box]],
        out: Sequence[Tensor],
    ) -> list[DataError | None]:
        """See CropReader.read; `out` are tensors on `device`."""
        errors: list[DataError | None] = [None] * len(images)
        plain: dict[int, tuple[np.ndarray, list[tuple[int, int, int, int]]]] = {}
        for number, data in enumerate(map(_bytes_of, images)):
            size = None if data is None else size_of_plain_jpeg(data)
            if size is not None:
                plain[number] = data, [_whole(box) for box in boxes_of(number, *size)]
        rest = set(range(len(images))) - set(plain) | self._read_plain(plain, out)
        for number in sorted(rest):
            try:
                picture = read_picture(images[number], self.in_chans, names[number])
            except DataError as e:
                errors[number] = e.alone()
                continue
            for (size, filter), box, tensor in zip(self.crops, boxes_of(number, picture.width, picture.height), out):
                tensor[number] = torch.from_numpy(np.ascontiguousarray(picture.crop(box, size, filter)))
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return errors

    def _read_plain(self, plain: dict[int, tuple[np.ndarray, list]], out: Sequence[Tensor]) -> set[int]:
        """Returns the numbers of those that did not work out."""
        failed: set[int] = set()
        numbers = list(plain)
        # Crops that share a box share its decode.
        groups: dict[tuple, list[int]] = {}
        for k in range(len(self.crops)):
            groups.setdefault(tuple(plain[number][1][k] for number in numbers), []).append(k)
        for boxes, members in groups.items():
            if not numbers:
                break
            decoded = self.decode([plain[n][0] for n in numbers], list(boxes), [self.crops[k][0] for k in members])
            for k, pictures in zip(members, decoded):
                for number, picture in zip(numbers, pictures):
                    if picture is None:
                        failed.add(number)
                    else:
                        out[k][number] = picture
        return failed


class DeviceLoader(CropLoader):
    """Batches of random crops, decoded by another library in one thread of this process: it has threads of its own, and
    perhaps the GPU.

    Args:
        data: see index.open_index, or an index.
        crops, options: see CropLoader.
        workers: 0 or None.
    Raises:
        ValueError: other `workers`, crops or channels than the decoder has.
        ModuleNotFoundError: the library is not installed; the message has the command.
    """

    reader_class: type[DeviceReader]

    def __init__(
        self,
        data: str | os.PathLike[str] | ImageIndex,
        crops: Sequence[CropSpec],
        *,
        workers: int | None = 0,
        **options: Any,
    ):
        if workers:
            raise ValueError(f"workers: expected 0 or None, got {workers}: the decoder runs in this process.")
        index = open_index(data) if isinstance(data, str | os.PathLike) else data
        super().__init__(index, crops, reader_class=self.reader_class, **options | {"workers": 0, "threads": 1})

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for batch in super()._batches(epoch, start_step):
            for crop in batch.crops:
                if crop.is_cuda:
                    # It is of the decoder's stream, on which nothing must be put in its place before it was read here.
                    crop.record_stream(torch.cuda.current_stream(crop.device))
            yield batch


def _bytes_of(image: Encoded) -> np.ndarray | None:
    try:
        return np.frombuffer(read_bytes(image), np.uint8)
    except Exception:  # Pillow's path will say what is wrong
        return None


def size_of_plain_jpeg(data: np.ndarray) -> tuple[int, int] | None:
    """Width and height of a gray or color JPEG file of 8 bits that has an end; None for everything else."""
    if _END not in data[-_TAIL:].tobytes():
        return None
    decoder, _ = load()
    if decoder is not None:
        with decoder.open([data]) as batch:
            return (int(batch.widths[0]), int(batch.heights[0])) if batch.status[0] == 0 else None
    try:
        image = Image.open(io.BytesIO(data.tobytes()), formats=["JPEG"])
    except Exception:  # Pillow's path will say what is wrong
        return None
    is_allowed = Image.MAX_IMAGE_PIXELS is None or image.width * image.height <= Image.MAX_IMAGE_PIXELS
    return image.size if image.mode in ("L", "RGB") and is_allowed else None


def _whole(box: Box) -> tuple[int, int, int, int]:
    """Left, top, width, height in whole pixels."""
    left, top = int(box[0]), int(box[1])
    return left, top, max(1, round(box[0] + box[2]) - left), max(1, round(box[1] + box[3]) - top)
