"""Loaders side by side: images per second and CPU time per image, workers included. `pytest bench/bench_loader.py`

Numbers are printed, never asserted: they belong to the machine and its other load. CPU time per image is the figure to
compare; images per second is what a trainer would get here and now.
"""

import multiprocessing
import os
import platform
import sys
import time
from itertools import chain, count
from pathlib import Path

import pytest
import torch
from fastmim_pipelines import LOADERS, CropSpec, make_loader
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.demo import DemoSpec, write_demo
from fastmim_pipelines.workers import PREFETCH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the workers' CPU time")

IMAGES = int(os.environ.get("FASTMIM_BENCH_IMAGES", 512))
ROUNDS = 3
BATCH = 64
# As ImageNet's: 500 x 375 and the like, some 100 kB; or the demo's own, some 10 kB.
SOURCES = {"demo": DemoSpec(), "photo size": DemoSpec(short_side_px=(333, 375), grain=(3.0, 13.0))}
REQUESTS = {
    "64": (CropSpec((64, 64)),),
    "224": (CropSpec((224, 224)),),
    "2 x 224": (CropSpec((224, 224)), CropSpec((224, 224), view=1)),
}


@pytest.fixture(scope="module", params=SOURCES)
def pictures(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_demo(folder, images=256, val_images=0, spec=SOURCES[request.param], progress=lambda line: None)
    return folder / "train"


def cpu_seconds() -> float:
    """CPU time so far of this process and of its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(name: str, crops: tuple[CropSpec, ...], folder: Path, workers: int) -> tuple[float, float]:
    """Images per second and CPU milliseconds per image of a loader that runs at its pace, its queues full."""
    options = {} if name == "synthetic" else {"workers": workers}
    loader, _ = make_loader(name, crops, data=folder, batch_size=BATCH, **options)
    batches = chain.from_iterable(map(loader.epoch, count()))
    for _ in range(PREFETCH * workers + 1):
        next(batches)
    began, cpu_began, images = time.perf_counter(), cpu_seconds(), 0
    while images < IMAGES:
        images += len(next(batches).ids)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
    loader.close()
    return images / seconds, 1000 * cpu / images


@pytest.mark.parametrize("crops", REQUESTS)
@pytest.mark.parametrize("name", LOADERS)
def bench_loader(name, crops, pictures, capsys, request):
    torch.set_num_threads(1)
    source = request.node.callspec.params["pictures"]
    if name == "synthetic" and source != "demo":
        pytest.skip("reads no pictures: measured once")
    size_kb = sum(path.stat().st_size for path in pictures.rglob("*.jpg")) / 256_000
    for workers in (0,) if name == "synthetic" else (0, available_cores()):
        rates, costs = zip(*(measure(name, REQUESTS[crops], pictures, workers) for _ in range(ROUNDS)))
        with capsys.disabled():
            print(
                f"\n{name:10s} {source:10s} {size_kb:5.0f} kB  crop {crops:8s} workers {workers:2d}: "
                f"{sorted(rates)[ROUNDS // 2]:8.0f} images/s, {sorted(costs)[ROUNDS // 2]:6.2f} CPU ms/image "
                f"(median of {ROUNDS}, {IMAGES} images, {platform.machine()}, {available_cores()} cores)",
                end="",
            )
