"""Lists of images with their class labels: what any of them can do, and the images below a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import ClassVar, Protocol

import numpy as np

from .native_decode import Encoded
from .spec import DataError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")


class ImageIndex(Protocol):
    """A list of images, wherever their bytes are; picklable, and cheaply so.

    Attributes:
        kind: name of the loader for it.
        root: what messages call the whole.
        classes: names of the classes; empty when there are none.
        labels: (n,) int64 index into `classes`, or None.
    """

    kind: ClassVar[str]
    root: str
    classes: list[str]
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """What messages call image `index`, 0..n-1: its path, or what comes closest to one."""
        ...

    def name(self, index: int) -> str:
        """The image's name within the whole, without its root."""
        ...

    def encoded(self, indices: Sequence[int]) -> Sequence[Encoded]:
        """Where the bytes of the images are, or the bytes."""
        ...


class Names:
    """Many byte strings in one block: a million of them cost some 40 MB, and worker processes share or receive them
    cheaply.

    Attributes:
        block: (bytes,) uint8; ends: (n,) int64, where in it each name ends.
    """

    def __init__(self, block: np.ndarray, ends: np.ndarray):
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        listed = list(names)
        block = np.frombuffer(b"".join(listed), np.uint8)
        return cls(block, np.cumsum([len(name) for name in listed], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        return self.block[start : int(self.ends[index])].tobytes()


def classes_of_folders(names: Iterable[str], separator: str = "/") -> list[str | None]:
    """The first-level folder of each image; None for one that lies in the root itself."""
    return [name.split(separator, 1)[0] if separator in name else None for name in names]


def numbered(
    root: str, of_image: Sequence[str | None], classes: Sequence[str] | None
) -> tuple[list[str], np.ndarray | None]:
    """The list of classes and each image's number in it; no labels if an image has no class.

    Args:
        classes: the list to number by; None = the classes found, sorted.
    Raises:
        DataError: a class that is not in the list; exit code 2.
    """
    is_labeled = None not in of_image
    found = sorted(set(of_image)) if is_labeled else []
    names = list(classes) if classes is not None else found
    number = {name: label for label, name in enumerate(names)}
    unknown = [name for name in found if name not in number]
    if unknown:
        raise DataError(
            f"{printable(root)}: expected only known classes, got also {unknown[:3]}; name the folders as in the training set.",
            path=root,
            reason="unknown class",
            exit_code=2,
        )
    return names, np.array([number[name] for name in of_image], dtype=np.int64) if is_labeled else None


class FolderIndex:
    """All images below a folder, at any depth, in an order that depends on their names only.

    Hidden files and folders are skipped, symbolic links followed. The first-level folder of an image is its class.

    Args:
        folder: where to look.
        classes: number the labels by this list, e.g. the training set's; None = the folders found here, sorted.
    Attributes:
        root: the folder as given.
        classes: names of the classes; empty when there are none.
        labels: (n,) int64 index into `classes`, or None when at least one image lies in the root itself.
    Raises:
        DataError: the folder is missing, not a folder, unreadable or without any image, or it has a class that is not
            in the given list; exit code 2.
    """

    kind = "folder"

    def __init__(self, folder: str | os.PathLike[str], *, classes: Sequence[str] | None = None):
        self.root = os.fspath(folder)
        names = list(_images_below(self.root))
        if not names:
            raise DataError(
                f"{printable(self.root)}: expected images ({' '.join(EXTENSIONS)}) at any depth, got none; "
                "check the path.",
                path=self.root,
                reason="no images",
                exit_code=2,
            )
        self._names = Names.of(map(os.fsencode, names))
        of_image = classes_of_folders(names, os.sep)
        self.classes, self.labels = numbered(self.root, of_image, classes)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        """Full path of image `index`, 0..n-1."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def encoded(self, indices: Sequence[int]) -> list[str]:
        return [self.path(index) for index in indices]


def named(numbers: np.ndarray, names: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The class of each image by its number in a list of names, and the list; a number without a name is its own name.

    Args:
        numbers: (n,) at least 0. names: may be empty, or shorter than the largest number.
    """
    found = np.unique(numbers).tolist()  # and not all numbers up to the largest: that may be any
    name_of = {number: names[number] if number < len(names) else str(number) for number in found}
    nameless = [name_of[number] for number in found if number >= len(names)]
    return [name_of[number] for number in numbers.tolist()], [*names, *nameless]


class _Remaining:
    """An index without some of its images; see `without`."""

    def __init__(self, index: ImageIndex, kept: np.ndarray):
        self.kind, self.root, self.classes = index.kind, index.root, index.classes
        self.labels = None if index.labels is None else index.labels[kept]
        self.damage = getattr(index, "damage", [])
        self._index, self._kept = index, kept

    def __len__(self) -> int:
        return len(self._kept)

    def path(self, index: int) -> str:
        return self._index.path(int(self._kept[index]))

    def name(self, index: int) -> str:
        return self._index.name(int(self._kept[index]))

    def encoded(self, indices: Sequence[int]) -> Sequence[Encoded]:
        return self._index.encoded(self._kept[np.asarray(indices)].tolist())


def without(index: ImageIndex, list_path: str | os.PathLike[str]) -> ImageIndex:
    """The index without the images named in a list that `verify` has written: one JSON object with "name" per line.

    Sample ids are places in the index that is left, so the order of a run depends on the list.

    Raises:
        DataError: the list cannot be read or names no image that is there, or nothing is left; exit code 2.
    """
    path = os.fspath(list_path)
    try:
        with open(path) as file:
            names = {json.loads(line)["name"] for line in file if line.strip()}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{printable(path)}: expected one JSON object with a name per line ({type(e).__name__}: {e}); "
            "write the list with verify-data.",
            path=path,
            reason="not a list of images",
            exit_code=2,
        ) from e
    kept = np.array([i for i in range(len(index)) if index.name(i) not in names], np.int64)
    if not len(kept):
        raise DataError(
            f"{printable(index.root)}: no image is left without those of {printable(path)}.", path=path, exit_code=2
        )
    if names and len(kept) == len(index):
        raise DataError(
            f"{printable(path)}: expected names of images of {printable(index.root)}, got none of them; "
            "write the list anew with verify-data.",
            path=path,
            reason="a list of other images",
            exit_code=2,
        )
    return _Remaining(index, kept)


def open_index(
    data: str | os.PathLike[str], loader: str = "auto", *, classes: Sequence[str] | None = None
) -> ImageIndex:
    """The list of images at a path.

    Args:
        loader: folder, tar, ffcv or hf; auto: a .beton file is for ffcv, a .tar file or a folder with such files at its
            top for tar, likewise .parquet and what `datasets` has saved for hf, everything else for folder.
        classes: see FolderIndex.
    Raises:
        ValueError: another loader. DataError: see the indices.
    """
    if loader == "auto":
        loader = _kind_at(os.fspath(data))
    if loader not in _INDICES:
        raise ValueError(
            f"loader: expected one of auto, {', '.join(_INDICES)} for {printable(os.fspath(data))}, got {loader!r}."
        )
    module, name = _INDICES[loader]
    return getattr(import_module(f".{module}", __package__), name)(data, classes=classes)


_INDICES = {
    "folder": ("index", "FolderIndex"),
    "tar": ("tar", "TarIndex"),
    "ffcv": ("ffcv_file", "BetonIndex"),
    "hf": ("hf", "HfIndex"),
}


def _kind_at(path: str) -> str:
    """By its ending, or by what lies at the top of a folder."""
    kinds = {".beton": "ffcv", ".tar": "tar", ".parquet": "hf"}
    ending = os.path.splitext(path)[1].lower()
    if ending in kinds and not os.path.isdir(path):
        return kinds[ending]
    try:
        with os.scandir(path) as entries:
            names = {entry.name.lower() for entry in entries if entry.is_file()}
    except OSError:
        return "folder"  # which says what is wrong
    if {"dataset_info.json", "state.json"} <= names:
        return "hf"
    endings = {os.path.splitext(name)[1] for name in names}
    return next((kinds[ending] for ending in (".tar", ".parquet") if ending in endings), "folder")


def _images_below(root: str) -> Iterator[str]:
    """Paths relative to the root, each folder's entries sorted by name."""
    if not os.path.isdir(root):
        kind = "a file" if os.path.exists(root) else "nothing there"
        raise DataError(
            f"{printable(root)}: expected a folder of images, got {kind}; check the path.",
            path=root,
            reason=kind,
            exit_code=2,
        )

    def walk(folder: str, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as e:
            raise DataError(
                f"{printable(folder)}: cannot be listed ({e.strerror}); give read access or move it away.",
                path=folder,
                reason=str(e.strerror),
                exit_code=2,
            ) from e
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return  # a link to a folder that we are inside of
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}{os.sep}", ancestors | {identity})
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                yield prefix + entry.name

    return walk(root, "", frozenset())
