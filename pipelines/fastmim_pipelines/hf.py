"""Training batches from a data set of Hugging Face `datasets`: saved to disk, or Parquet files. Needs that package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .index import ImageIndex, named, numbered
from .loader import CropLoader
from .native_decode import Encoded
from .spec import CropSpec, DataError, printable

PACKAGE = "datasets"


class HfIndex:
    """The images of a data set that lies on disk.

    Args:
        data: folder that `save_to_disk` has written, a folder with .parquet files at any depth, or one such file.
        classes: number the labels by this list, e.g. the training set's; None = those of the data set.
    Attributes:
        root, classes, labels: see ImageIndex. The images are those of the first column of images; labels are those of the
            column of class labels or, without one, of the column "label", if it holds whole numbers.
    Raises:
        ModuleNotFoundError: the package is not installed; the message has the command.
        DataError: no such data set, no images in it, or a class that is not in the list; exit code 2.
    """

    kind = "hf"

    def __init__(self, data: str | os.PathLike[str], *, classes: Sequence[str] | None = None):
        try:
            datasets = import_module(PACKAGE)
        except ImportError as e:
            raise ModuleNotFoundError(
                f"loader: hf needs {PACKAGE}, which does not import ({e}); pip install {PACKAGE}"
            ) from e
        self.root = os.fspath(data)
        try:
            rows = _open(datasets, self.root)
        except Exception as e:  # the package raises its own and those of what it is built on
            raise _unusable(self.root, f"cannot be opened ({type(e).__name__}: {' '.join(str(e).split())})") from e
        column = next((name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)), None)
        if column is None:
            raise _unusable(self.root, f"expected a column of images, got {', '.join(rows.column_names) or 'none'}")
        if not len(rows):
            raise _unusable(self.root, "no rows")
        self._column = column
        numbers, names = _labels(datasets, rows)
        of_image: list[str | None] = [None] * len(rows)
        if numbers is not None:
            of_image, known = named(numbers, names)
            classes = known if classes is None else classes
        self.classes, self.labels = numbered(self.root, of_image, classes)
        # Bytes, not pictures: those are ours to decode.
        self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        return f"{self.root}: row {index}"

    def name(self, index: int) -> str:
        return str(index)

    def encoded(self, indices: Sequence[int]) -> list[Encoded]:
        images = self._rows[[int(index) for index in indices]][self._column]
        return [_bytes_of(image) for image in images]


class HfLoader(CropLoader):
    """Batches of random crops of the images of a data set of Hugging Face.

    Args:
        data: see HfIndex, or an index that is there already.
        crops, options: see CropLoader.
    """

    def __init__(self, data: str | os.PathLike[str] | ImageIndex, crops: Sequence[CropSpec], **options: Any):
        super().__init__(HfIndex(data) if isinstance(data, str | os.PathLike) else data, crops, **options)


def _open(datasets: Any, root: str) -> Any:
    path = Path(root)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_dir() and not files:
        return datasets.load_from_disk(root)
    return datasets.Dataset.from_parquet([str(file) for file in files])


def _labels(datasets: Any, rows: Any) -> tuple[np.ndarray | None, list[str]]:
    """Number of each row's class, and the names of the classes."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            numbers = np.asarray(rows.with_format("numpy")[name][:])
            return (numbers.astype(np.int64), list(feature.names)) if (numbers >= 0).all() else (None, [])
    if "label" in rows.column_names:
        numbers = np.asarray(rows.with_format("numpy")["label"][:])
        if numbers.dtype.kind in "iu" and (numbers >= 0).all():
            return numbers.astype(np.int64), []
    return None, []


def _bytes_of(image: dict[str, Any] | None) -> Encoded:
    """The bytes, or the path where they are; none at all for an empty cell."""
    if image is None:
        return b""
    return image["bytes"] if image["bytes"] is not None else image["path"] or b""


def _unusable(root: str, reason: str) -> DataError:
    message = f"{printable(root)}: {printable(reason)}; expected what save_to_disk writes, or .parquet files."
    return DataError(message, path=root, reason=reason, exit_code=2)
