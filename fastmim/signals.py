"""Signals that ask a run to end: it saves first; a second one ends it at once."""

import os
import signal
import sys


class Stop:
    """Remembers that the process was asked to end.

    SIGUSR1 is what schedulers send ahead of time, some of them more than once: it never ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is not None and number != signal.SIGUSR1:
            sys.stdout.flush()
            os._exit(128 + number)  # killed without saving
        self.signal = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
