"""Files kept open for readers of parts of them, and files that do not answer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable

from .native_decode import Encoded, FileSpan

_MOST_OPEN = 256  # the usual limit of a process is 1,024


_PATIENCE_S = 10  # for one byte


def first_without_answer(images: Callable[[], Iterable[Encoded]]) -> str | None:
    """The file of the first image of which not one byte can be had in time; None if all answer, or say why not.

    Args:
        images: called in the thread that reads, because it may hang, too.
    """
    at, is_done = [0, ""], threading.Event()

    def look() -> None:
        for image in images():
            if isinstance(image, str | FileSpan):
                at[:] = at[0] + 1, image if isinstance(image, str) else image.path
                with contextlib.suppress(OSError):
                    _touch(image)
        is_done.set()

    # Nothing ends a thread that hangs in the kernel; it must not keep the program from ending.
    threading.Thread(target=look, daemon=True, name="data-look").start()
    before = -1
    while not is_done.wait(_PATIENCE_S):
        if at[0] == before:
            return str(at[1])
        before = at[0]
    return None


def _touch(image: str | FileSpan) -> None:
    path, offset = (image, 0) if isinstance(image, str) else (image.path, image.offset)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.pread(descriptor, 1, offset)
    finally:
        os.close(descriptor)


class OpenFiles:
    """Descriptors of the first files that are asked for; the others are opened by whoever reads them."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OpenFiles, ()  # another process opens its own

    def descriptor(self, path: str) -> int:
        """-1 if the file is not kept open, or cannot be."""
        known = self._descriptors.get(path)
        if known is not None or len(self._descriptors) >= _MOST_OPEN:
            return -1 if known is None else known
        try:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # the reader will find out why, for one image
        # Another thread may have been first. No lock: a process may be forked here.
        kept = self._descriptors.setdefault(path, opened)
        if kept != opened:
            os.close(opened)
        return kept

    def __del__(self, close=os.close) -> None:  # at the end of the program, the module may be gone
        for descriptor in self._descriptors.values():
            close(descriptor)
