"""Training batches from tar shards in WebDataset's layout, read in place: random access, true shuffle, exact resume."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cores import available_cores
from .index import EXTENSIONS, ImageIndex, Names, classes_of_folders, named, numbered
from .loader import CropLoader
from .native_decode import FileSpan
from .open_files import OpenFiles
from .spec import CropSpec, DataError, printable
from .tar_scan import Member, scan

_GENERATION = 1  # of the index files
INDEX_NAME = ".fastmim-index.npz"
CLASSES_NAME = "classes.json"
_LONGEST_LABEL = 32  # bytes


class TarIndex:
    """The images in tar shards, in the order of the shards' names and, within each, of their members.

    A member whose name ends like an image's is an image. Its label is the number in the member of the same key (the name
    up to the first dot of its last part) that ends in .cls; without those, its first-level folder is its class, as in a
    folder of images. Everything else is passed over, and nothing is extracted.

    The places of the images are kept in an index file beside the shards or, where that cannot be written, in the user's
    cache folder. It is made at first use, and again when a shard's size or time of change is another.

    Args:
        data: folder with .tar files at any depth, or one such file.
        classes: number the labels by this list, e.g. the training set's; None = classes.json beside the shards, if it is
            there, else the folders or numbers found.
    Attributes:
        damage: (path, reason) of each shard that cannot be read to its end; the images before that place are listed.
        root, classes, labels: see ImageIndex.
    Raises:
        DataError: nothing there, no shards, no images, or a class that is not in the list; exit code 2.
    """

    kind = "tar"

    def __init__(self, data: str | os.PathLike[str], *, classes: Sequence[str] | None = None):
        self.root = os.fspath(data)
        self._shards = _shards_at(self.root)
        table = _load(self.root, self._shards) or _make(self.root, self._shards)
        self._shard, self._offset, self._size = table["shard"], table["offset"], table["size"]
        self._names = Names(table["names"], table["ends"])
        self.damage = _damage(table)
        if not len(self):
            raise DataError(
                f"{printable(self.root)}: expected images ({' '.join(EXTENSIONS)}) in the tar files, got none"
                f"{''.join(f'; {printable(path)}: {reason}' for path, reason in self.damage[:1])}; check the path.",
                path=self.root,
                reason="no images",
                exit_code=2,
            )
        numbers = table["label"]
        if (numbers >= 0).all():
            of_image, known = named(numbers, _class_names(self.root))
            classes = known if classes is None else classes
        else:
            of_image = classes_of_folders(map(self.name, range(len(self))))
        self.classes, self.labels = numbered(self.root, of_image, classes)
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> str:
        return f"{self._shards[self._shard[index]]}: {self.name(index)}"

    def name(self, index: int) -> str:
        return self._names[index].decode("utf-8", "surrogateescape")

    def encoded(self, indices: Sequence[int]) -> list[FileSpan]:
        places = np.asarray(indices)
        columns = (self._shard[places].tolist(), self._offset[places].tolist(), self._size[places].tolist())
        return [
            FileSpan(self._shards[shard], offset, size, self._files.descriptor(self._shards[shard]))
            for shard, offset, size in zip(*columns)
        ]


class TarLoader(CropLoader):
    """Batches of random crops of the images in tar shards.

    Args:
        data: folder with .tar files, one such file, or an index that is there already.
        crops, options: see CropLoader.
    """

    def __init__(self, data: str | os.PathLike[str] | ImageIndex, crops: Sequence[CropSpec], **options: Any):
        super().__init__(TarIndex(data) if isinstance(data, str | os.PathLike) else data, crops, **options)


def _shards_at(root: str) -> list[str]:
    if os.path.isfile(root):
        return [root]
    shards = sorted(str(path) for path in Path(root).rglob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not shards:
        compressed = next((path for path in Path(root).rglob("*.tar.*")), None)
        kind = "nothing there" if not os.path.exists(root) else f"only {compressed.name}" if compressed else "none"
        raise DataError(
            f"{printable(root)}: expected .tar files, not compressed, got {printable(kind)}; check the path.",
            path=root,
            reason="no tar files",
            exit_code=2,
        )
    return shards


def _class_names(root: str) -> list[str]:
    folder = Path(root) if os.path.isdir(root) else Path(root).parent
    try:
        names = json.loads((folder / CLASSES_NAME).read_text())
    except (OSError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


# -- the index file ----------------------------------------------------------------------------------------------------


def _places_of_index(root: str) -> list[Path]:
    """Where an index may lie, the best first."""
    absolute = os.path.abspath(root)
    beside = Path(absolute) / INDEX_NAME if os.path.isdir(root) else Path(absolute + INDEX_NAME)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastmim"
    return [beside, cache / f"{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:24]}.npz"]


def _state(root: str, shards: Sequence[str]) -> np.ndarray:
    """By what an index that is out of date is known, as bytes."""
    states = [(os.path.relpath(shard, root), os.stat(shard).st_size, os.stat(shard).st_mtime_ns) for shard in shards]
    return _bytes([_GENERATION, *states])


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _load(root: str, shards: Sequence[str]) -> dict[str, np.ndarray] | None:
    for place in _places_of_index(root):
        try:
            with np.load(place, allow_pickle=False) as file:
                table = dict(file)
            if np.array_equal(table["state"], _state(root, shards)) and _is_sound(table, shards):
                return table
        except Exception:  # not there, or not what we wrote: it is made again
            continue
    return None


def _is_sound(table: dict[str, np.ndarray], shards: Sequence[str]) -> bool:
    """Whether every image lies within its shard: the file is not ours alone to write."""
    shard, offset, size, label, ends = columns = [table[key] for key in ("shard", "offset", "size", "label", "ends")]
    if any(column.ndim != 1 or column.dtype.kind != "i" for column in columns) or table["names"].dtype != np.uint8:
        return False
    sizes = np.array([os.stat(path).st_size for path in shards])
    return bool(
        len(shard) == len(offset) == len(size) == len(ends) == len(label)
        and (not len(ends) or (shard.min() >= 0 and shard.max() < len(shards)))
        and (offset >= 0).all()
        and (size >= 0).all()
        and (offset <= sizes[shard] - size).all()  # the sum of the two may be more than 64 bits hold
        and (np.diff(ends, prepend=0) >= 0).all()
        and (not len(ends) or ends[-1] == len(table["names"]))
        and all(isinstance(path, str) and isinstance(reason, str) for path, reason in _damage(table))
    )


def _damage(table: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(table["damage"].tobytes())]


def _make(root: str, shards: Sequence[str]) -> dict[str, np.ndarray]:
    state = _state(root, shards)  # before the scan: what changes meanwhile is scanned again
    columns: dict[str, list[np.ndarray]] = {key: [] for key in ("shard", "offset", "size", "label")}
    names, damage = [], []
    for number, (images, labels, reason) in enumerate(_scan_all(shards)):
        columns["shard"].append(np.full(len(images), number, np.int32))
        columns["offset"].append(np.array([image.offset for image in images], np.int64))
        columns["size"].append(np.array([image.size for image in images], np.int64))
        columns["label"].append(np.array(labels, np.int64))
        names += [image.name.encode("utf-8", "surrogateescape") for image in images]
        if reason:
            damage.append((shards[number], reason))
    table = {key: np.concatenate(parts) for key, parts in columns.items()}
    compact = Names.of(names)
    table |= {"names": compact.block, "ends": compact.ends, "damage": _bytes(damage), "state": state}
    for place in _places_of_index(root):
        new = place.with_name(f"{place.name}.{os.getpid()}.new.npz")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            np.savez(new, **table)
            os.replace(new, place)
            break
        except OSError:
            new.unlink(missing_ok=True)
    return table


def _scan_all(shards: Sequence[str]):
    """(images, their labels or -1, what is wrong) of each shard."""
    from .workers import Answers  # here: torch is not needed to read an index that is there

    workers = min(available_cores(), len(shards) // 4)
    answers = Answers(_Scanner(), shards, workers=workers if workers > 1 else 0, result_bytes=1 << 20)
    try:
        yield from answers
    finally:
        answers.close()


class _Scanner:
    def __getitem__(self, shard: str) -> tuple[list[Member], list[int], str]:
        try:
            members, reason = scan(shard)
        except OSError as e:
            return [], [], f"cannot be read ({e.strerror})"
        members = [member for member in members if not _is_hidden(member.name)]
        images = [member for member in members if member.name.lower().endswith(EXTENSIONS)]
        label_of: dict[str, int] = {}
        label_members = [member for member in members if member.name.endswith(".cls")]
        if label_members:
            with open(shard, "rb", buffering=0) as file:
                for member in label_members:
                    text = os.pread(file.fileno(), min(member.size, _LONGEST_LABEL), member.offset).strip()
                    if re.fullmatch(rb"[0-9]{1,9}", text):
                        label_of[_key(member.name)] = int(text)
        return images, [label_of.get(_key(image.name), -1) for image in images], reason


def _key(name: str) -> str:
    """What the members of one sample have in common. Source: webdataset README, "The WebDataset Format"."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
