"""Worker processes that decode: a thin layer over torch's DataLoader that starts them safely and stops them surely."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

PREFETCH = 2  # finished or running requests per worker
_SHARED_MEMORY = "/dev/shm"
_IGNORED = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class Answers:
    """Answers of `dataset[request]` in the order of the requests, worked out by worker processes ahead of need.

    Args:
        dataset: must be picklable, as must the requests.
        requests: may be endless.
        workers: processes; 0 = work in this one, when asked.
        result_bytes: size of one answer, to check that the shared memory holds those under way.
        pin_memory: give page-locked tensors.
        timeout_s: longest silence of a worker.
    Raises:
        ValueError: the shared memory is too small.
        RuntimeError: (from the iterator) a worker died or was silent for too long.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Iterable[Any],
        *,
        workers: int,
        result_bytes: int,
        pin_memory: bool = False,
        timeout_s: float = 300,
    ):
        in_processes: dict[str, Any] = {}
        if workers:
            _check_shared_memory(workers, result_bytes)
            method = start_method()
            if method == "forkserver":  # imports once, in the server, what every worker needs
                multiprocessing.set_forkserver_preload(["torch", "PIL.Image"])
            in_processes = dict(
                num_workers=workers,
                prefetch_factor=PREFETCH,
                timeout=timeout_s,
                worker_init_fn=partial(_settle_worker, method != "forkserver"),
                multiprocessing_context=method,
            )
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=requests,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            # Its own: DataLoader draws a seed when it starts, and must not touch the global random state.
            generator=torch.Generator(),
            **in_processes,
        )
        with _signals_held():
            self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except (EOFError, ConnectionError, FileNotFoundError) as e:
            # What a worker leaves behind that dies while it hands over an answer.
            raise RuntimeError(
                "data workers: expected an answer, got a closed connection: a worker was killed; "
                "look for out-of-memory messages, or use fewer workers."
            ) from e

    def close(self) -> None:
        """End the workers and wait for them; may be called twice."""
        # Dropping the last reference would do it, too, but a traceback may hold one for long.
        shut_down = getattr(self._iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def start_method() -> str:
    """How workers start: by fork where it is safe (fast, shares the index), not with a CUDA context in this process."""
    if sys.platform == "linux" and not torch.cuda.is_initialized():
        return "fork"
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _as_is(answer: Any) -> Any:
    return answer


@contextmanager
def _signals_held() -> Iterator[None]:
    """Workers begin with the held signals blocked, so that none hits them before they are settled."""
    if not hasattr(signal, "sigtimedwait"):  # not Linux
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *_IGNORED})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_worker(is_direct_child: bool, worker_id: int) -> None:
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


def most_workers(result_bytes: int) -> float:
    """How many workers' answers the shared memory can hold at once; infinite where it is not a folder (not Linux)."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return math.inf
    return max(0, (free // result_bytes - 1) // PREFETCH)


def _check_shared_memory(workers: int, result_bytes: int) -> None:
    most, needed_mib = most_workers(result_bytes), ((workers * PREFETCH + 1) * result_bytes >> 20) + 1
    if workers > most:
        raise ValueError(
            f"workers: expected at most {most:.0f} for the free space of {_SHARED_MEMORY}, got {workers}; "
            f"use that, or start the container with --shm-size={2 * needed_mib}m."
        )
