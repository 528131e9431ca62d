"""Which signals a worker process heeds: the trainer's order to end, and none that are meant for the trainer."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


@contextmanager
def signals_held() -> Iterator[None]:
    """Workers begin with the held signals blocked, so that none hits them before they are settled."""
    if not hasattr(signal, "sigtimedwait"):  # not Linux
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *_IGNORED})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_worker(is_direct_child: bool, worker_id: int) -> None:
    """Leave signals to the trainer: it may want one more batch, and time to save, before it ends its workers itself."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigtimedwait"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    # A scheduler signals the whole process group: that TERM is the trainer's affair. The trainer's own TERM is an
    # order. Only a waiting thread learns who sent it; it also notices an orphaned worker, even one stuck in a decoder.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    starter_pid = os.getppid()  # the trainer, or the fork server
    if starter_pid != parent.pid if is_direct_child else not parent.is_alive():
        os._exit(0)  # orphaned before it could note whose child it was
    # A spawned worker ends like a program: Python would tear itself down under the waiting thread, which then aborts
    # the process when it wakes. A worker has nothing left to tear down.
    atexit.register(os._exit, 0)
    threading.Thread(target=_obey, args=(parent.pid, starter_pid), daemon=True).start()


def _obey(trainer_pid: int, starter_pid: int) -> None:
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if (received is not None and received.si_pid == trainer_pid) or os.getppid() != starter_pid:
            os._exit(0)
