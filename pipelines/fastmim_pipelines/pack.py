"""From any list of images to tar shards or a .beton file: verified, if wished smaller, in the same order.

Every image is decoded whole. One that cannot be is left out and reported.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from .cores import available_cores
from .decode import read_bytes, read_picture
from .ffcv_file import DEFAULT_PAGE, MOST_PAGE, BetonWriter
from .index import EXTENSIONS, ImageIndex
from .loader import BadImage
from .native_decode import Encoded, FileSpan
from .spec import DataError, printable
from .tar import CLASSES_NAME
from .workers import Answers

Resize = tuple[Literal["max", "short"], int]
DEFAULT_QUALITY = 90  # Source: FFCV's ImageNet benchmark, scripts/write_imagenet.sh: longest side 500, quality 90
_SHARD_BYTES = 256 << 20
_CHUNK = 32  # images per request to a worker
_CHECKSUMS = "checksums.npz"
_ENDINGS = {"PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


class Packed(NamedTuple):
    """What was written."""

    images: int
    bytes: int
    files: list[str]
    bad: list[BadImage]
    """Images that were left out."""


class _Recoded(NamedTuple):
    sample_id: int
    data: bytes
    extension: str
    sides: tuple[int, int]
    """(width, height)."""
    is_raw: bool


def pack(
    index: ImageIndex,
    out: str | os.PathLike[str],
    *,
    to: Literal["tar", "beton"],
    resize: Resize | None = None,
    quality: int | None = None,
    in_chans: int = 3,
    shard_bytes: int = _SHARD_BYTES,
    workers: int | None = None,
    progress: Callable[[str], object] = print,
    advance: Callable[[int, int], object] | None = None,
) -> Packed:
    """Write the images of an index into a folder of tar shards, or a .beton file.

    Without `resize` and `quality`, JPEG files are taken over byte for byte; other files, too, into a tar, and as raw
    pixels into a .beton file. With one of the two, every image becomes a new JPEG file (EXIF is left behind).

    Args:
        out: a folder that is empty or not there yet; or the path of a .beton file that is not there yet.
        resize: ("max", n): the longer side becomes n pixels; ("short", n): the shorter one does. Never upwards. Bicubic
            with antialiasing.
        quality: of JPEG, 1..100; default DEFAULT_QUALITY.
        in_chans: channels that the images are read with: 1 or 3, into a tar without new JPEG files any number (.npy).
        shard_bytes: size at which a new tar file begins.
        workers: processes; None = one per core, 0 = work in this one.
        progress: called with one line of text now and then.
        advance: called with the number of images done and of all, instead of `progress` now and then.
    Raises:
        ValueError: arguments out of range, or something is there already.
        DataError: not one image is usable.
        OSError: the place cannot be written.
    """
    target = Path(out)
    if to not in ("tar", "beton"):
        raise ValueError(f"to: expected tar or beton, got {to!r}.")
    if resize is not None and (resize[0] not in ("max", "short") or resize[1] < 1):
        raise ValueError(f"resize: expected ('max' or 'short', at least 1), got {resize!r}.")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1..100, got {quality}.")
    if target.exists() and (to == "beton" or not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"out: expected nothing at {printable(str(target))}, got something; choose another place or remove it."
        )
    if resize is not None and quality is None:
        quality = DEFAULT_QUALITY
    if in_chans not in (1, 3) and (to == "beton" or quality is not None):
        raise ValueError(f"in_chans: expected 1 or 3 for JPEG and .beton files, got {in_chans}.")
    recoder = _Recoder(index, in_chans, resize, quality, keeps_other_formats=to == "tar")
    writer = _TarWriter(target, index, shard_bytes) if to == "tar" else _BetonFile(target, index)
    bad: list[BadImage] = []
    sizes, checksums = [], []
    with writer:
        for images, bad_images in _with_progress(recoder, len(index), workers, progress, advance):
            for image in images:
                writer.add(image)
                sizes.append(len(image.data))
                checksums.append(zlib.crc32(image.data))
            bad += bad_images
            for each in bad_images:
                progress(f"pack: left out {printable(each.path)}: {each.reason}")
        if not sizes:
            raise DataError(f"{printable(index.root)}: expected usable images, got none.", path=index.root, exit_code=2)
        files = writer.finish()
    np.savez(_checksums_of(target), size=np.array(sizes, np.int64), crc32=np.array(checksums, np.uint32))
    progress(
        f"pack: {len(sizes)} images, {sum(sizes) / 1e6:.1f} MB in {len(files)} files at {printable(str(target))}; {len(bad)} left out"
    )
    return Packed(len(sizes), sum(sizes), files, bad)


def _checksums_of(target: Path) -> Path:
    return target / _CHECKSUMS if target.is_dir() else target.with_suffix(f".{_CHECKSUMS}")


def read_checksums(root: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Size and CRC-32 of the bytes of each image, as pack wrote them; None where it did not."""
    try:
        with np.load(_checksums_of(Path(root)), allow_pickle=False) as file:
            return file["size"], file["crc32"]
    except (OSError, ValueError, KeyError):
        return None


def _with_progress(
    recoder: _Recoder,
    count: int,
    workers: int | None,
    progress: Callable[[str], object],
    advance: Callable[[int, int], object] | None,
) -> Iterator[tuple[list[_Recoded], list[BadImage]]]:
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    workers = available_cores() if workers is None else workers
    answers = Answers(recoder, chunks, workers=min(workers, len(chunks)), result_bytes=1 << 20)
    tenth = 1
    try:
        for done, answer in enumerate(answers, start=1):
            yield answer
            if advance is not None:
                advance(chunks[done - 1].stop, count)
            elif 10 * done >= tenth * len(chunks):
                progress(f"pack: {100 * done // len(chunks)} %")
                tenth = 10 * done // len(chunks) + 1
    finally:
        answers.close()


class _Recoder:
    """Sample ids -> what to write, and bad images; runs in the workers."""

    def __init__(
        self, index: ImageIndex, in_chans: int, resize: Resize | None, quality: int | None, keeps_other_formats: bool
    ):
        self.index, self.in_chans, self.resize, self.quality = index, in_chans, resize, quality
        self.keeps_other_formats = keeps_other_formats

    def __getitem__(self, ids: range) -> tuple[list[_Recoded], list[BadImage]]:
        images, bad = [], []
        for sample_id, source in zip(ids, self.index.encoded(ids)):
            try:
                images.append(self._recoded(sample_id, source))
            except DataError as e:
                bad.append(BadImage(sample_id, self.index.path(sample_id), e.reason))
        return images, bad

    def _recoded(self, sample_id: int, source: Encoded) -> _Recoded:
        name = self.index.path(sample_id)
        is_raw = isinstance(source, FileSpan) and source.width > 0
        picture = read_picture(source, self.in_chans, name)
        try:
            data = bytes(read_bytes(source))
        except OSError as e:
            raise DataError(name, path=name, reason=f"cannot be read ({e.strerror})") from e
        is_jpeg = data.startswith(b"\xff\xd8\xff") and not is_raw
        if self.quality is None and (is_jpeg or (self.keeps_other_formats and not is_raw)):
            extension = ".jpg" if is_jpeg else _ending(self.index.name(sample_id), data)
            return _Recoded(sample_id, data, extension, (picture.width, picture.height), False)
        if len(picture.planes) > 1:
            raise DataError(name, path=name, reason="an array cannot become a JPEG file or raw pixels")
        image, out = picture.planes[0], io.BytesIO()
        if self.quality is not None:
            if self.resize is not None:
                image = image.resize(new_size(image.size, self.resize), Image.Resampling.BICUBIC)
            image.save(out, "JPEG", quality=self.quality, optimize=True)
        elif self.keeps_other_formats:  # raw pixels into a tar
            image.save(out, "PNG")
        else:
            return _Recoded(sample_id, image.convert("RGB").tobytes(), "", image.size, True)
        return _Recoded(sample_id, out.getvalue(), ".png" if self.quality is None else ".jpg", image.size, False)


def _ending(name: str, data: bytes) -> str:
    """What tells readers of a tar file that a member is an image; the rows of a table have no such names."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending in EXTENSIONS else _ENDINGS[Image.open(io.BytesIO(data), formats=list(_ENDINGS)).format]


def new_size(size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Width and height after resizing; never larger than before."""
    ratio = min(1.0, resize[1] / (max(size) if resize[0] == "max" else min(size)))
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


class _TarWriter:
    """A folder of shards: for each image KEY.jpg and, if it has a class, KEY.cls with its number."""

    def __init__(self, folder: Path, index: ImageIndex, shard_bytes: int):
        self._folder, self._index, self._shard_bytes = folder, index, shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()
        self._files: list[str] = []
        self._written = 0

    def __enter__(self) -> _TarWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, image: _Recoded) -> None:
        if self._tar is None or self._written >= self._shard_bytes:
            self._close_shard()
            self._files.append(str(self._folder / f"{len(self._files):06d}.tar"))
            self._tar = tarfile.open(f"{self._files[-1]}.partial", "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            self._written = 0
        key = self._key(image.sample_id)
        self._append(key + image.extension, image.data)
        if self._index.labels is not None:
            self._append(f"{key}.cls", str(self._index.labels[image.sample_id]).encode())
        self._written += len(image.data)

    def _append(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def _key(self, sample_id: int) -> str:
        """The image's name without its ending; unlike any before, and without the dots that end a key."""
        folder, slash, last = self._index.name(sample_id).replace(os.sep, "/").rpartition("/")
        wanted = folder.lstrip("/") + slash + os.path.splitext(last)[0].replace(".", "_")
        key = wanted if wanted not in self._keys else f"{wanted}-{sample_id}"
        self._keys.add(key)
        return key

    def finish(self) -> list[str]:
        self._close_shard()
        if self._index.classes:
            (self._folder / CLASSES_NAME).write_text(json.dumps(self._index.classes))
        return self._files

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            os.replace(f"{self._files[-1]}.partial", self._files[-1])
            self._tar = None

    def __exit__(self, *error: object) -> None:
        if self._tar is not None:
            self._tar.close()
            os.unlink(f"{self._files[-1]}.partial")


class _BetonFile:
    """A .beton file. The number of its samples stands before them, so what is to be written waits in a file beside it."""

    def __init__(self, path: Path, index: ImageIndex):
        self._path, self._index = path, index
        self._waiting: list[tuple[int, int, tuple[int, int], bool]] = []

    def __enter__(self) -> _BetonFile:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._spool = open(f"{self._path}.spool", "w+b")
        return self

    def add(self, image: _Recoded) -> None:
        self._waiting.append((image.sample_id, len(image.data), image.sides, image.is_raw))
        self._spool.write(image.data)

    def finish(self) -> list[str]:
        largest = max(size for _, size, _, _ in self._waiting)
        page_size = max(DEFAULT_PAGE, 1 << (largest - 1).bit_length())
        if page_size > MOST_PAGE:
            raise ValueError(
                f"{printable(str(self._path))}: expected images below {MOST_PAGE} bytes, got one of {largest}."
            )
        self._spool.seek(0)
        with BetonWriter(self._path, len(self._waiting), page_size) as writer:
            for sample_id, size, sides, is_raw in self._waiting:
                label = -1 if self._index.labels is None else int(self._index.labels[sample_id])
                writer.add(self._spool.read(size), label, sides, is_raw=is_raw)
        if self._index.classes:
            self._path.with_suffix(".classes.json").write_text(json.dumps(self._index.classes))
        return [str(self._path)]

    def __exit__(self, *error: object) -> None:
        self._spool.close()
        os.unlink(f"{self._path}.spool")
