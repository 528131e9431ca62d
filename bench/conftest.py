"""`pytest bench`: every suite at a size that 2 CPU cores finish in ten minutes, with tables and pictures of what was measured
in a new folder of `runs/`, or in FASTMIM_BENCH_RESULTS, where a run that was broken off goes on. The suites' own variables,
and their options under `fastmim bench`, run more.

Where pytest-benchmark is installed, it gets the same times: `pytest bench --benchmark-json=FILE`, and its other options.
"""

import os
import statistics
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "1")
os.environ.setdefault("FASTMIM_BENCH_SHORT", "1")
ROOT = Path(__file__).resolve().parents[1]


class Replay:
    """A clock that measured times move. pytest-benchmark runs one thing after the other, ours take turns: it is shown
    afterwards, by this clock, what they took."""

    now = 0.0

    @classmethod
    def clock(cls) -> float:
        return cls.now

    @classmethod
    def move(cls, seconds: list[float]) -> None:
        cls.now += seconds.pop(0)


class NoBenchmark:
    """In place of pytest-benchmark, where it is not installed."""

    @pytest.fixture
    def benchmark(self):
        return None


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark: options of pytest-benchmark, which is not installed")
        config.pluginmanager.register(NoBenchmark())


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Two compilations and seven ways to take a step are one item.
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.benchmark(timer=Replay.clock))


@pytest.fixture
def told(benchmark):
    """(seconds of ours, round by round; way -> seconds) -> None: tells pytest-benchmark, if there is one."""

    def tell(seconds: list[float], ways: dict[str, float]) -> None:
        if benchmark is not None:
            benchmark.extra_info |= {"seconds": ways, "ours": statistics.median(seconds)}
            benchmark.pedantic(Replay.move, args=(list(seconds),), rounds=len(seconds))

    return tell


@pytest.fixture(scope="session")
def results():
    """The folder of this run's results."""
    folder = os.environ.get("FASTMIM_BENCH_RESULTS")
    folder = Path(folder) if folder else ROOT / "runs" / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"\nresults: {folder}; FASTMIM_BENCH_RESULTS={folder} goes on with them")
    yield folder
    from report import write_report

    print()
    for path in sorted(folder.glob("*.jsonl")):
        write_report(path)
    print(f"tables and pictures: {folder}")
