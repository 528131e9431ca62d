"""Read every image of a data set once, whole, and tell which ones are of no use."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .cores import available_cores
from .decode import read_bytes, read_picture
from .index import ImageIndex
from .loader import BadImage
from .pack import read_checksums
from .spec import DataError, printable
from .workers import Answers

_CHUNK = 64  # images per request to a worker


class Verified(NamedTuple):
    images: int
    """That were read, the bad ones among them."""
    bad: list[BadImage]
    damage: list[tuple[str, str]]
    """(path, reason) of files of many images that cannot be read to their end."""
    has_checksums: bool
    """Whether the bytes were compared with the checksums of pack."""


def verify(
    index: ImageIndex,
    *,
    in_chans: int = 3,
    list_path: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Callable[[str], object] = print,
    advance: Callable[[int, int], object] | None = None,
) -> Verified:
    """Decode every image as a loader would, but whole; compare its bytes with the checksum, where there is one.

    Args:
        in_chans: see CropLoader.
        list_path: write the bad images to this file, for `index.without`.
        workers: processes; None = one per core, 0 = work in this one.
        progress: called with one line of text for each bad image, and now and then.
        advance: called with the number of images read and of all, instead of `progress` now and then.
    """
    checksums = read_checksums(index.root)
    if checksums is not None and len(checksums[0]) != len(index):
        progress(f"verify: the checksums are those of {len(checksums[0])} images, not of {len(index)}: not used")
        checksums = None
    chunks = [range(start, min(start + _CHUNK, len(index))) for start in range(0, len(index), _CHUNK)]
    workers = available_cores() if workers is None else workers
    verifier = _Verifier(index, in_chans, checksums)
    answers = Answers(verifier, chunks, workers=min(workers, len(chunks)), result_bytes=1 << 16)
    damage: list[tuple[str, str]] = list(getattr(index, "damage", []))
    for path, reason in damage:
        progress(f"verify: {printable(path)}: {reason}")
    bad: list[BadImage] = []
    tenth = 1
    try:
        for done, found in enumerate(answers, start=1):
            bad += found
            for image in found:
                progress(f"verify: {printable(image.path)}: {image.reason}")
            if advance is not None:
                advance(chunks[done - 1].stop, len(index))
            elif 10 * done >= tenth * len(chunks):
                progress(f"verify: {100 * done // len(chunks)} %")
                tenth = 10 * done // len(chunks) + 1
    finally:
        answers.close()
    if list_path is not None:
        with open(list_path, "w") as file:
            for image in bad:
                file.write(json.dumps({"name": index.name(image.sample_id), "reason": image.reason}) + "\n")
    compared = " and compared with their checksums" if checksums is not None else ""
    progress(f"verify: {len(index)} images read{compared}, {len(bad)} of no use")
    return Verified(len(index), bad, damage, checksums is not None)


class _Verifier:
    """Sample ids -> the bad images among them; runs in the workers."""

    def __init__(self, index: ImageIndex, in_chans: int, checksums: tuple[np.ndarray, np.ndarray] | None):
        self.index, self.in_chans, self.checksums = index, in_chans, checksums

    def __getitem__(self, ids: range) -> list[BadImage]:
        bad = []
        for sample_id, source in zip(ids, self.index.encoded(ids)):
            name = self.index.path(sample_id)
            try:
                read_picture(source, self.in_chans, name)
                if self.checksums is not None:
                    data = read_bytes(source)
                    if (len(data), zlib.crc32(data)) != tuple(int(column[sample_id]) for column in self.checksums):
                        raise DataError(name, path=name, reason="its bytes are not those that were packed")
            except (DataError, OSError) as e:
                bad.append(
                    BadImage(
                        sample_id, name, e.reason if isinstance(e, DataError) else f"cannot be read ({e.strerror})"
                    )
                )
        return bad
