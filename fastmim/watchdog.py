"""Who holds the others up: a rank that hangs ends the run with its name, one that is slow is reported.

A rank that hangs leaves the others in a collective, where they learn nothing. So each posts where it is to the store of
the process group, and one that has not moved for too long reads what the others posted.
"""

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed import distributed_c10d

from fastmim import dist

EXIT_CODE = 7
# In the order of a step: the rank that is least far is the one that the others wait for.
PHASES = ("waiting for data", "forward", "backward", "update", "after the update")
# Evaluation, saving and setting up take as long as the data and the disk make them.
OPEN_ENDED = 6
# Slower than the median rank by this factor is worth a line. Source: own choice; scheduling noise stays below it.
SLOW_FACTOR = 1.5


class Place(NamedTuple):
    """Where a rank is."""

    step: int
    phase: str
    waits: bool
    """Whether it is inside a collective of ours."""
    beat: int
    """Counts up as long as the process runs at all."""
    who: str

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)


def laggards(before: dict[int, Place], after: dict[int, Place]) -> list[tuple[int, str]]:
    """(rank, why) of those that hold the others up; empty if all are equally far.

    Args:
        before, after: what the ranks posted, read twice with more than a beat between.
    """
    frozen = [rank for rank, place in after.items() if rank in before and before[rank].beat == place.beat]
    if frozen:
        return [(rank, "its process does not run: stopped, out of memory, or its host is gone") for rank in frozen]
    least = min(place.order for place in after.values())
    last = [rank for rank, place in after.items() if place.order == least]
    if len(last) == len(after):
        last = [rank for rank in last if not after[rank].waits]
    if len(last) == len(after):
        return []
    return [(rank, "its process runs, but does not get on") for rank in last]


class Watchdog:
    """Threads beside the training of one rank; idle where there is one process.

    Args:
        limit_s: so long nothing may move.
        leave: how to end; for tests.
    """

    def __init__(self, limit_s: float, leave: Callable[[int], None] = os._exit):
        self.limit_s, self._leave = limit_s, leave
        self.step, self.phase = 0, "setting up"
        self._moved = time.monotonic()
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []
        self._interval_s = min(5.0, limit_s / 5)
        self._who = f"{socket.gethostname()}, process {os.getpid()}"

    def start(self) -> None:
        if dist.world_size() == 1:
            return
        # Connections of their own: the training's may be waiting for an answer.
        store = distributed_c10d._get_default_store()
        self._stores = [store.clone(), store.clone()]
        for work in (self._post, self._watch):
            thread = threading.Thread(target=work, daemon=True, name=f"watchdog-{work.__name__}")
            thread.start()
            self._threads.append(thread)

    def at(self, step: int, phase: str) -> None:
        """Says where the training is."""
        self.step, self.phase = step, phase
        self._moved = time.monotonic()

    def close(self) -> None:
        self._end.set()

    def _post(self) -> None:
        beat = 0
        while True:
            beat += 1
            place = [self.step, self.phase, dist.is_waiting, beat, self._who]
            try:
                self._stores[0].set(f"watchdog/{dist.rank()}", json.dumps(place))
            except RuntimeError:
                return  # the store's host is gone: the training will notice, or the watching thread
            if self._end.wait(self._interval_s):
                return

    def _watch(self) -> None:
        while not self._end.wait(self._interval_s):
            limit = self.limit_s * (1 if self.phase in PHASES else OPEN_ENDED)
            silent = time.monotonic() - self._moved
            if silent > limit:
                self._report(silent)
                return

    def _report(self, silent: float) -> None:
        found: list[str] = []
        reader = threading.Thread(target=lambda: found.append(self._explain()), daemon=True)
        reader.start()
        reader.join(6 * self._interval_s)
        why = found[0] if found else "rank 0's host, which keeps the rendezvous, does not answer: stopped, or gone"
        print(
            f"error: watchdog: rank {dist.rank()} has not moved for {silent:.0f} s (step {self.step}, {self.phase}): {why}; "
            f"the last checkpoint is kept, continue with --resume",
            file=sys.stderr,
            flush=True,
        )
        self._leave(EXIT_CODE)

    def _explain(self) -> str:
        try:
            before = self._read()
            # Longer than a beat, so that whoever lives has posted again.
            time.sleep(2.5 * self._interval_s)
            after = self._read()
        except RuntimeError as e:
            return f"rank 0's host, which keeps the rendezvous, is gone ({str(e).splitlines()[0]})"
        silent = sorted(set(range(dist.world_size())) - set(after))
        if silent:
            return f"ranks {silent} never said where they are"
        guilty = laggards(before, after)
        if not guilty:
            return "all ranks are in the same place: look at the network"
        return "; ".join(
            f"waiting for rank {rank} ({after[rank].who}), last seen at step {after[rank].step}, {after[rank].phase}: {why}"
            for rank, why in guilty
        )

    def _read(self) -> dict[int, Place]:
        store, places = self._stores[1], {}
        for rank in range(dist.world_size()):
            key = f"watchdog/{rank}"
            if store.check([key]):
                places[rank] = Place(*json.loads(store.get(key)))
        return places


class Slow(NamedTuple):
    """A rank that is much slower than the others."""

    rank: int
    seconds: float
    others: float
    """Median."""
    is_again: bool
    """Whether it was so the time before; once may be chance."""


class Pace:
    """How long a rank works on a step before it needs the others: waiting for data, and forward passes.

    Waiting for others inside a forward pass does not count. On a GPU this is the host's time, which shows slow data and
    a busy host, and not a slow GPU.
    """

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0
        self._before: int | None = None

    def add(self, seconds: float) -> None:
        self._seconds += seconds

    def step(self) -> None:
        self._steps += 1

    def read(self) -> float:
        """Seconds per step since the last call."""
        result = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        return result

    def slowest(self, seconds: list[float]) -> Slow | None:
        """The rank, if there is one, that is slower than the others; from what `read` gave on each."""
        if len(seconds) < 2:
            return None
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
        is_slow, before = seconds[rank] > SLOW_FACTOR * others, self._before
        self._before = rank if is_slow else None
        return Slow(rank, seconds[rank], others, rank == before) if is_slow else None
