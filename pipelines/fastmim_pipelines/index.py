"""The list of images below a folder, with their class labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from .spec import DataError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".npy")


class FolderIndex:
    """All images below a folder, at any depth, in an order that depends on their names only.

    Hidden files and folders are skipped, symbolic links followed. The first-level folder of an image is its class.
    Names are kept as one block of bytes: a million of them cost some 40 MB, and worker processes share or receive
    them cheaply.

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
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

        of_image = [name.split(os.sep, 1)[0] if os.sep in name else None for name in names]
        is_labeled = None not in of_image
        found = sorted(set(of_image)) if is_labeled else []
        self.classes: list[str] = list(classes) if classes is not None else found
        number = {name: label for label, name in enumerate(self.classes)}
        unknown = [name for name in found if name not in number]
        if unknown:
            raise DataError(
                f"{printable(self.root)}: expected only known classes, got also {unknown[:3]}; "
                "name the folders as in the training set.",
                path=self.root,
                reason="unknown class",
                exit_code=2,
            )
        self.labels = np.array([number[name] for name in of_image], dtype=np.int64) if is_labeled else None

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> str:
        """Full path of image `index`, 0..n-1."""
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self._block[start : int(self._ends[index])]))


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
