"""`pytest bench`: every suite at a size that 2 CPU cores finish in ten minutes, with tables and pictures of what was measured
in a new folder of `runs/`, or in FASTMIM_BENCH_RESULTS, where a run that was broken off goes on. The suites' own variables,
and their options under `fastmim bench`, run more."""

import os
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "1")
os.environ.setdefault("FASTMIM_BENCH_SHORT", "1")
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # Two compilations and seven ways to take a step are one item.
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def results():
    """The folder of this run's results."""
    folder = os.environ.get("FASTMIM_BENCH_RESULTS")
    folder = Path(folder) if folder else ROOT / "runs" / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    from report import write_report

    print()
    for path in sorted(folder.glob("*.jsonl")):
        write_report(path)
    print(f"tables and pictures: {folder}")
