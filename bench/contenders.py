"""Loaders that take turns: each in processes of its own, stopped but for its turns, timed by its CPU time and by the clock."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

WARM_UP_BATCHES, PATIENCE_S = 8, 10


def cpu_seconds() -> float:
    """CPU time so far of this process and of its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[int], images: int) -> tuple[float, float]:
    """CPU milliseconds per image and images per second of a loader that runs at its pace."""
    for _ in range(WARM_UP_BATCHES):  # what it has prefetched before
        next(batches)
    began, cpu_began, seen = time.perf_counter(), cpu_seconds(), 0
    while seen < images:
        seen += next(batches)
    return 1000 * (cpu_seconds() - cpu_began) / seen, seen / (time.perf_counter() - began)


def serve(contender: Callable, pipe) -> None:
    """A contender's process: makes it, then measures when asked to; None ends it."""
    os.setsid()
    torch.set_num_threads(1)
    try:
        with contender() as batches:
            next(batches)
            pipe.send(None)
            while (images := pipe.recv()) is not None:
                pipe.send(measure(batches, images))
    except Exception as e:
        pipe.send(f"{type(e).__name__}: {' '.join(str(e).split())}")
    finally:
        sys.stdout.flush()
        os._exit(0)  # some libraries' threads do not like to be ended


class Contender:
    """A contender in its process, stopped but for its turns."""

    def __init__(self, make: Callable):
        # Contenders leave without farewell, see serve: what they leave behind is no news.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(make, theirs))
        self._process.start()
        theirs.close()
        self.error = self._pipe.recv()
        if self.error is None:
            self._signal(signal.SIGSTOP)

    def measure(self, images: int) -> tuple[float, float]:
        self._signal(signal.SIGCONT)
        self._pipe.send(images)
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        if self.error is None:
            self._signal(signal.SIGCONT)
            self._pipe.send(None)
            self._process.join(PATIENCE_S)
            with suppress(ProcessLookupError):  # nothing is left of it
                self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)
