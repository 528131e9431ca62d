"""FFCV's .beton files, read in place and written, without FFCV.

Layout (version 2, little endian): header; one description per field; one row of metadata per sample; from the next page
on the data, no item of which crosses a page; at the end the table of all items. Source: libffcv/ffcv ffcv/types.py,
ffcv/writer.py, ffcv/fields/*.py. Offsets and sizes come from the file: none is used before it is known to lie in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .index import ImageIndex, named, numbered
from .loader import CropLoader
from .native_decode import FileSpan
from .open_files import OpenFiles
from .spec import CropSpec, DataError, printable

VERSION = 2
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
_FIELD = np.dtype([("type", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_ITEM = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
_BYTES = np.dtype([("place", "<u8"), ("size", "<u8")])
_FLOAT_TYPE, _INT_TYPE, _IMAGE_TYPE = 0, 1, 2
# Row of metadata of each type of field: numbers, image, bytes, array, JSON, tensor.
_ROWS = {
    _FLOAT_TYPE: np.dtype("<f8"), _INT_TYPE: np.dtype("<i8"), _IMAGE_TYPE: _IMAGE,
    3: _BYTES, 4: np.dtype("<u8"), 5: _BYTES, 6: np.dtype("<u8"),
}  # fmt: skip
JPEG, RAW = 0, 1
_MOST_FIELDS = 256
LEAST_PAGE, MOST_PAGE = 1 << 21, 1 << 31
DEFAULT_PAGE = 1 << 23


class BetonIndex:
    """The images in a .beton file.

    Args:
        path: the file.
        classes: number the labels by this list, e.g. the training set's; None = NAME.classes.json beside NAME.beton, if
            it is there, else the numbers found.
    Attributes:
        root, classes, labels: see ImageIndex. Labels are those of the first field of whole numbers, "label" before others.
    Raises:
        DataError: not such a file, or one cut short or broken, without an image field or samples; exit code 2.
    """

    kind = "ffcv"

    def __init__(self, path: str | os.PathLike[str], *, classes: Sequence[str] | None = None):
        self.root = os.fspath(path)
        try:
            with open(self.root, "rb") as file:
                names, types, rows, items = _read_tables(file)
        except OSError as e:
            raise _unusable(self.root, f"cannot be read ({e.strerror})") from e
        except _Broken as e:
            raise _unusable(self.root, str(e)) from e
        image = _field(names, types, _IMAGE_TYPE, "image")
        if image is None:
            raise _unusable(self.root, f"expected a field with images, got {', '.join(map(repr, names)) or 'none'}")
        self._mode, self._place, self._size, self._sides = _images(rows[f"f{image}"], items, os.stat(self.root).st_size)
        label = _field(names, types, _INT_TYPE, "label")
        numbers = None if label is None else rows[f"f{label}"]
        of_image: list[str | None] = [None] * len(self)
        if numbers is not None and (numbers >= 0).all():
            of_image, known = named(numbers, _class_names(self.root))
            classes = known if classes is None else classes
        self.classes, self.labels = numbered(self.root, of_image, classes)
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self._place)

    def path(self, index: int) -> str:
        return f"{self.root}: sample {index}"

    def name(self, index: int) -> str:
        return str(index)

    def encoded(self, indices: Sequence[int]) -> list[FileSpan]:
        chosen = np.asarray(indices)
        descriptor = self._files.descriptor(self.root)
        rows = (
            self._place[chosen].tolist(),
            self._size[chosen].tolist(),
            self._mode[chosen].tolist(),
            self._sides[chosen].tolist(),
        )
        return [
            FileSpan(self.root, place, size, descriptor, *(sides if mode == RAW else (0, 0)))
            for place, size, mode, sides in zip(*rows)
        ]


class BetonLoader(CropLoader):
    """Batches of random crops of the images in a .beton file.

    Args:
        data: the file, or an index that is there already.
        crops, options: see CropLoader.
    """

    def __init__(self, data: str | os.PathLike[str] | ImageIndex, crops: Sequence[CropSpec], **options: Any):
        super().__init__(BetonIndex(data) if isinstance(data, str | os.PathLike) else data, crops, **options)


class _Broken(Exception):
    """Why a file is none of ours."""


def _unusable(path: str, reason: str) -> DataError:
    message = f"{printable(path)}: {reason}; expected a .beton file of FFCV, version {VERSION}: write it again."
    return DataError(message, path=path, reason=reason, exit_code=2)


def _read_tables(file: BinaryIO) -> tuple[list[str], list[int], np.ndarray, np.ndarray]:
    """Names and types of the fields, the rows of metadata, the table of items sorted by place."""
    size = os.fstat(file.fileno()).st_size
    header = _read(file, 0, _HEADER, 1, size)[0]
    if header["version"] != VERSION:
        raise _Broken(f"version {header['version']}")
    fields, samples, table = (int(header[key]) for key in ("fields", "samples", "table"))
    if not 0 < fields <= _MOST_FIELDS or not samples:
        raise _Broken(f"{fields} fields and {samples} samples")
    descriptions = _read(file, _HEADER.itemsize, _FIELD, fields, size)
    types = descriptions["type"].tolist()
    unknown = [number for number in types if number not in _ROWS]
    if unknown:
        raise _Broken(f"a field of unknown type {unknown[0]}")
    names = [bytes(name).split(b"\0", 1)[0].decode("ascii", "replace") for name in descriptions["name"]]
    row = np.dtype([("", _ROWS[number]) for number in types], align=True)
    rows = _read(file, _HEADER.itemsize + descriptions.nbytes, row, samples, size)
    if table > size or (size - table) % _ITEM.itemsize:
        raise _Broken("its table of items is broken: the file was cut short, or never finished")
    items = _read(file, table, _ITEM, (size - table) // _ITEM.itemsize, size)
    return names, types, rows, items[np.argsort(items["place"], kind="stable")]


def _read(file: BinaryIO, start: int, dtype: np.dtype, count: int, size: int) -> np.ndarray:
    if start + dtype.itemsize * count > size:  # whole numbers of Python: no overflow
        raise _Broken(f"cut short: {count} rows of {dtype.itemsize} bytes at {start} of {size}")
    file.seek(start)
    return np.frombuffer(file.read(dtype.itemsize * count), dtype)


def _field(names: list[str], types: list[int], wanted: int, preferred: str) -> int | None:
    of_type = [number for number, kind in enumerate(types) if kind == wanted]
    return next((number for number in of_type if names[number] == preferred), of_type[0] if of_type else None)


def _images(rows: np.ndarray, items: np.ndarray, file_size: int) -> tuple[np.ndarray, ...]:
    """Mode, place, size and (width, height) of each image; size 0 where the file does not tell a possible place."""
    place = rows["place"]
    found = np.searchsorted(items["place"], place)
    is_known = found < len(items)
    item = items[np.where(is_known, found, 0)] if len(items) else np.zeros(len(place), _ITEM)
    is_known &= item["place"] == place
    limit = np.uint64(file_size)
    # In unsigned numbers and without a sum: a place of 2**64 - 1 must not wrap around.
    is_inside = (place <= limit) & (item["size"] <= limit - np.minimum(place, limit))
    sides = np.stack([rows["width"], rows["height"]], 1).astype(np.int64)
    raw_size = 3 * sides[:, 0] * sides[:, 1]
    is_raw = rows["mode"] == RAW
    is_good = is_known & is_inside & (rows["mode"] <= RAW)
    size = np.where(is_good, item["size"], 0).astype(np.int64)
    size = np.where(is_raw, np.where((raw_size > 0) & (raw_size <= size), raw_size, 0), size)
    return rows["mode"], np.where(is_good, place, 0).astype(np.int64), size, np.where(size[:, None] > 0, sides, 0)


def _class_names(path: str) -> list[str]:
    try:
        names = json.loads(Path(path).with_suffix(".classes.json").read_text())
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


class BetonWriter:
    """Writes a file with the fields image and label that FFCV and BetonIndex read. Use as a context manager.

    The file appears under its name when it is complete.

    Args:
        path: of the file.
        samples: how many will be added.
        page_size: a power of two of at least 2 MiB; no image may be larger. Default: FFCV's, 8 MiB.
    Raises:
        ValueError: impossible numbers; from `add`, an image larger than a page or without bytes; at the end, another number of samples.
    """

    def __init__(self, path: str | os.PathLike[str], samples: int, page_size: int = DEFAULT_PAGE):
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}.")
        if not LEAST_PAGE <= page_size <= MOST_PAGE or page_size & (page_size - 1):
            raise ValueError(f"page_size: expected a power of two in {LEAST_PAGE}..{MOST_PAGE}, got {page_size}.")
        self._path, self._page_size = os.fspath(path), page_size
        self._row = np.dtype([("f0", _IMAGE), ("f1", "<i8")], align=True)
        self._rows = np.zeros(samples, self._row)
        self._items = np.zeros(samples, _ITEM)
        self._count = 0
        start = _HEADER.itemsize + 2 * _FIELD.itemsize + self._rows.nbytes
        self._at = -(-start // page_size) * page_size
        self._file = open(f"{self._path}.partial", "wb")  # noqa: SIM115  closed by __exit__

    def add(self, data: bytes, label: int, sides: tuple[int, int], *, is_raw: bool = False) -> None:
        """Append an image.

        Args:
            data: a JPEG file, or rows of RGB pixels.
            label: any whole number; -1 for none.
            sides: (width, height).
        """
        # Without bytes of its own it would share its place in the table of items with the next one.
        if not 0 < len(data) <= self._page_size:
            raise ValueError(
                f"image {self._count}: expected at most a page of {self._page_size} bytes and at least one, got {len(data)}."
            )
        room = -self._at % self._page_size
        if len(data) > room > 0:
            self._at += room
        self._file.seek(self._at)
        self._file.write(data)
        self._rows[self._count] = ((RAW if is_raw else JPEG, *sides, self._at), label)
        self._items[self._count] = (self._count, self._at, len(data))
        self._count += 1
        self._at += len(data)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            if kind is not None or self._count != len(self._rows):
                os.unlink(f"{self._path}.partial")
        if kind is None:
            os.replace(f"{self._path}.partial", self._path)

    def _finish(self) -> None:
        if self._count != len(self._rows):
            raise ValueError(f"samples: expected {len(self._rows)}, got {self._count}.")
        # FFCV reads whole pages.
        table = -(-self._at // self._page_size) * self._page_size
        self._file.seek(table)
        self._file.write(self._items.tobytes())
        header, fields = np.zeros(1, _HEADER), np.zeros(2, _FIELD)
        header[0] = (VERSION, 2, self._page_size, len(self._rows), table)
        for field, kind, name in zip(fields, (_IMAGE_TYPE, _INT_TYPE), (b"image", b"label")):
            field["type"] = kind
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        self._file.seek(0)
        for part in (header, fields, self._rows):
            self._file.write(part.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
