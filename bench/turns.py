"""A way to take a training step, when it is its turn: in this process, or in one of its own.

On a CPU each way has its process: what one way frees or keeps changes how the system serves another's memory, and with it
its time, by a third and more. On a GPU they share one, as they share its memory.
"""

import math
import multiprocessing
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import peers
import torch
from counters import counted
from machine import IS_GPU, allocated, clock
from providers import Ours

from fastmim.config import ConfigError

PATIENCE_S = 20
# Of a turn on a CPU: the first steps after another way's turn find its data in the caches.
LEAST_TURN_S = 0.2
# Why there is no such way here; other errors are mistakes, or those of other people's code.
ABSENT = (LookupError, ImportError, ConfigError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Facts:
    """Of a way that has taken some steps."""

    losses: list[float]
    first_step_s: float
    peak_mib: float | None
    """On a GPU: what a step needs, weights included."""
    parts: int
    """Micro-batches of its step."""
    batch_size: int
    batch_multiple: int


class Here:
    """A way in this process.

    Args:
        kind: of the way.
        case: see `bench_step.make_case`.
        checked: steps that it takes first.

    Raises: one of ABSENT.
    """

    def __init__(self, kind: type[Ours], case: dict, checked: int):
        before, began = allocated(), time.perf_counter()
        self.way = way = kind(case)
        losses, first_step_s = [], math.nan
        for i in range(checked):
            way.prepare()
            # Not the first, in which compilers try things; but a graph takes its memory when it is captured.
            if IS_GPU and i == min(1, checked - 1):
                torch.cuda.reset_peak_memory_stats()
            losses.append(float(way.step()))
            if i == 0:
                first_step_s = time.perf_counter() - began
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if IS_GPU else None
        assert all(map(math.isfinite, losses)), f"no speed for losses {losses}"
        self.facts = Facts(losses, first_step_s, peak, way.parts, way.batch_size, way.method.batch_multiple)

    def turn(self) -> float:
        """Seconds of one step; on a CPU the mean of as many as fill LEAST_TURN_S."""
        total, steps = 0.0, 0
        while not steps or (total < LEAST_TURN_S and not IS_GPU):
            self.way.prepare()
            start = clock()
            self.way.step()
            total, steps = total + clock() - start, steps + 1
        return total / steps

    def counted(self) -> dict:
        return counted(self.way)

    def close(self) -> None:
        """Nothing to leave behind."""


class Apart:
    """The same in a process of its own, which sleeps but for its turns."""

    def __init__(self, kind: type[Ours], case: dict, checked: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads(), kind, case, checked)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.facts: Facts = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self) -> float:
        self._pipe.send("turn")
        return self._answer()

    def counted(self) -> dict:
        self._pipe.send("counted")
        return self._answer()

    def close(self) -> None:
        self._pipe.close()  # which ends `_serve`
        self._process.join(PATIENCE_S)
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of a way died: exit code {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe, threads: int, kind: type[Ours], case: dict, checked: int) -> None:
    """An `Apart`'s process: makes the way, then does what it is told."""
    torch.set_num_threads(threads)
    try:
        why = peers.missing(kind.needs) if kind.needs else ""
        if why:
            raise ImportError(why)
        here = Here(kind, case, checked)
    except ABSENT as e:
        # Its words alone: not every error survives the way through a pipe.
        pipe.send(LookupError(str(e)))
        return
    except Exception as e:
        pipe.send(RuntimeError(f"{type(e).__name__}: {e}"))
        raise
    # Until the other end is gone.
    with suppress(EOFError, BrokenPipeError):
        pipe.send(here.facts)
        while True:
            pipe.send(getattr(here, pipe.recv())())
