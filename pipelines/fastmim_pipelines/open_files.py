"""Files kept open for readers of parts of them."""

from __future__ import annotations

import os

_MOST_OPEN = 256  # the usual limit of a process is 1,024


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

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
