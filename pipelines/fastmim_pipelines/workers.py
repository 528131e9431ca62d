"""Who decodes ahead of need: worker processes (a thin layer over torch's DataLoader) or threads of this process."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from .cores import default_workers
from .decode import CropReader
from .spec import DataError
from .worker_signals import settle_worker, signals_held

# Else torch, on a worker's death, raises in the main thread wherever that is: in the middle of a forward pass, where nobody
# starts the worker again. Who waits for a batch finds out by itself.
signal_handling._SIGCHLD_handler_set = True

PREFETCH = 2  # finished or running requests per worker
_AT_ONCE = 4  # answers that threads work on at the same time, at most
_PATIENCE_S = 10  # for a thread or process to end what it is at
_SILENCE_S = 20  # after which it is asked why, again and again
_SHARED_MEMORY = "/dev/shm"


def parallelism(
    workers: int | None, threads: int | None, reader: CropReader, world: int, pin_memory: bool, answer_bytes: int
) -> tuple[int, int]:
    """How many processes, and how many threads in each of them or, where there is none, in this one.

    Args:
        workers, threads: as asked for, see CropLoader.
    """
    cores = default_workers(world, trains_on_cpu=not pin_memory)
    if workers is None:
        if reader.uses_native or threads:
            return 0, threads or cores
        workers = int(min(cores, most_workers(answer_bytes)))
    return workers, threads if threads is not None else min(1, workers)


def answers_of(
    dataset: Any,
    requests: Iterable[Any],
    *,
    workers: int,
    threads: int,
    result_bytes: int,
    pin_memory: bool,
    timeout_s: float,
    on_silence: Callable[[float], object] | None = None,
) -> Answers | ThreadAnswers:
    """The answers of `dataset[request]` in order, by what `parallelism` says.

    Args:
        dataset: has a CropReader, `reader`, and a flag `pins`, whether to give page-locked tensors.
        requests, result_bytes, pin_memory, timeout_s, on_silence: see Answers.
    """
    if workers or not threads:
        dataset.reader.threads = max(1, threads)
        return Answers(
            dataset,
            requests,
            workers=workers,
            result_bytes=result_bytes,
            pin_memory=pin_memory,
            timeout_s=timeout_s,
            on_silence=on_silence,
        )
    # Several at a time: while one is between two calls of the decoder, the others keep the cores busy.
    at_once = min(threads, _AT_ONCE)
    dataset.reader.threads = -(-threads // at_once)
    is_on_gpu = str(dataset.reader.device) != "cpu"
    dataset.pins = pin_memory and not is_on_gpu
    has_gpu = pin_memory or is_on_gpu
    prepare = partial(_settle_thread, torch.cuda.current_device(), is_on_gpu) if has_gpu else None
    return ThreadAnswers(
        dataset, requests, threads=at_once, timeout_s=timeout_s, on_silence=on_silence, prepare=prepare
    )


class Answers:
    """Answers of `dataset[request]` in the order of the requests, worked out by worker processes ahead of need.

    Args:
        dataset: must be picklable, as must the requests.
        requests: may be endless.
        workers: processes; 0 = work in this one, when asked.
        result_bytes: size of one answer, to check that the shared memory holds those under way.
        pin_memory: give page-locked tensors.
        timeout_s: longest silence of a worker.
        on_silence: called now and then with the seconds of silence while an answer is waited for; may raise.
    Raises:
        DataError: the shared memory is too small.
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
        on_silence: Callable[[float], object] | None = None,
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
                timeout=min(timeout_s, _SILENCE_S),
                worker_init_fn=partial(settle_worker, method != "forkserver"),
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
        with signals_held():
            self._iterator = iter(loader)
        self._processes = getattr(self._iterator, "_workers", [])
        self._watch = _Watch(self._processes, timeout_s, on_silence) if workers else None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._watch is None:
            return next(self._iterator)
        with self._watch.waiting():
            while True:
                try:
                    return next(self._iterator)
                except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as e:
                    if self._watch.reason is not None:
                        raise self._watch.reason from None
                    if not isinstance(e, RuntimeError):
                        # What a worker leaves behind that dies while it hands over an answer.
                        raise RuntimeError(
                            "data workers: expected an answer, got a closed connection: a worker was killed; "
                            "look for out-of-memory messages, or use fewer workers."
                        ) from e
                    if "timed out" not in str(e):
                        raise

    def close(self) -> None:
        """End the workers and wait for them; may be called twice."""
        # Dropping the last reference would do it, too, but a traceback may hold one for long.
        shut_down = getattr(self._iterator, "_shutdown_workers", None)
        if shut_down is not None:
            with self._watch.waiting() if self._watch is not None else nullcontext():
                shut_down()
        # One that is stopped hears no polite word, and would be waited for at the end of the program.
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join(_PATIENCE_S)
        if self._watch is not None:
            self._watch.end()


class _Watch(threading.Thread):
    """Kills the workers when an answer is waited for in vain: whoever waits may be in the middle of a talk with one.

    Attributes:
        reason: why they were killed.
    """

    def __init__(self, processes: Sequence[Any], timeout_s: float, on_silence: Callable[[float], object] | None):
        super().__init__(daemon=True, name="data-watch")
        self._processes, self._timeout_s, self._on_silence = processes, timeout_s, on_silence
        self._since: float | None = None
        self._is_over = threading.Event()
        self.reason: Exception | None = None
        self.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def run(self) -> None:
        interval_s = min(self._timeout_s, _SILENCE_S)
        since, asked_s = self._since, 0.0
        while not self._is_over.wait(interval_s / 4):
            if self._since != since:
                since, asked_s = self._since, 0.0
            silent_s = 0.0 if since is None else time.monotonic() - since
            if silent_s < asked_s + interval_s:
                continue
            asked_s = silent_s
            try:
                _bear(silent_s, self._timeout_s, self._on_silence, "workers")
            except Exception as e:
                self.reason = e
                for process in self._processes:
                    process.kill()
                return

    def end(self) -> None:
        self._is_over.set()
        self.join(_PATIENCE_S)


def _bear(silent_s: float, timeout_s: float, on_silence: Callable[[float], object] | None, who: str) -> None:
    if on_silence is not None:
        on_silence(silent_s)
    if silent_s >= timeout_s:
        raise RuntimeError(
            f"data {who}: expected an answer within {timeout_s:g} s, got none; look whether the file system of the "
            "images hangs, or whether the process was stopped."
        )


class ThreadAnswers:
    """As Answers, worked out by threads of this process: for work that holds the interpreter's lock for little of its time.

    Nothing is copied between processes, nothing is forked, and a thread cannot be killed alone.

    Args:
        dataset, requests, timeout_s, on_silence: as for Answers.
        threads: answers under way at once; as many again, or one less, wait to be taken.
        prepare: called first in each thread.
    Raises:
        RuntimeError: (from the iterator) silence for too long. What `dataset[request]` raises, at its place in the order.
    """

    def __init__(
        self,
        dataset: Dataset,
        requests: Iterable[Any],
        *,
        threads: int,
        timeout_s: float = 300,
        on_silence: Callable[[float], object] | None = None,
        prepare: Callable[[], object] | None = None,
    ):
        self._requests, self._timeout_s, self._on_silence = iter(requests), timeout_s, on_silence
        self._interval_s = min(timeout_s, _SILENCE_S)
        self._tasks: SimpleQueue[tuple[Future, Any] | None] = SimpleQueue()
        self._pending: deque[Future] = deque()
        # Daemons: one that is stuck in a dead file system must not keep the program from ending.
        self._threads = [
            threading.Thread(target=_serve, args=(dataset, self._tasks, prepare), daemon=True, name=f"data-{i}")
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._ask(max(PREFETCH, 2 * threads - 1))

    def _ask(self, count: int) -> None:
        for request in islice(self._requests, count):
            future: Future = Future()
            self._pending.append(future)
            self._tasks.put((future, request))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._pending:
            raise StopIteration
        awaited, silent_s = self._pending.popleft(), 0.0
        while not awaited.done():
            try:
                awaited.exception(self._interval_s)
            except FutureTimeout:
                silent_s += self._interval_s
                _bear(silent_s, self._timeout_s, self._on_silence, "threads")
        answer = awaited.result()
        self._ask(1)
        return answer

    def close(self) -> None:
        """End the threads, and wait for what they are at; may be called twice."""
        while self._pending:
            self._pending.popleft().cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        self._threads = []


@cache
def _decode_stream(device: int) -> torch.cuda.Stream:
    # One for all threads there will be: torch keeps the memory of each stream apart.
    return torch.cuda.Stream(device)


def _settle_thread(device: int, uses_gpu: bool) -> None:
    # It begins with device 0, where the first page-locked tensor would put a context.
    torch.cuda.set_device(device)
    if uses_gpu:
        # It begins with the stream that everybody has, on which decoding and training would wait for each other.
        torch.cuda.set_stream(_decode_stream(device))


def _serve(dataset: Dataset, tasks: SimpleQueue, prepare: Callable[[], object] | None) -> None:
    if prepare is not None:
        prepare()
    while (task := tasks.get()) is not None:
        future, request = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(dataset[request])
        except BaseException as e:
            future.set_exception(e)


def start_method() -> str:
    """How workers start: by fork where it is safe (fast, shares the index), not with a CUDA context in this process."""
    if sys.platform == "linux" and not torch.cuda.is_initialized():
        return "fork"
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _as_is(answer: Any) -> Any:
    return answer


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
        raise DataError(
            f"workers: expected at most {most:.0f} for the free space of {_SHARED_MEMORY}, got {workers}; "
            f"use that, or start the container with --shm-size={2 * needed_mib}m."
        )
