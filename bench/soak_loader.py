"""Runs the loaders for a long time and watches what must not grow: memory, threads, open files, shared memory.

`python bench/soak_loader.py --minutes 10 --write bench/results/loaders-soak.md`

One process makes all loaders of the same drawn pictures (one in a hundred broken, replaced by --on-bad-image skip) and goes
around between them: some steps of each, new boxes, a jump to another place now and then (which ends its threads or worker
and starts new ones), an evaluation pass. `--duty` limits the load. What it watches is noted at the same point of each
round, with all loaders closed and free memory given back; the first fifth of the rounds is warm-up. Exit status 1 if
something grew.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.demo import write_demo
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.pack import pack

CROPS = (CropSpec((128, 128), uses_boxes=True), CropSpec((64, 64), view=1))
IMAGES, BATCH, STEPS = 400, 20, 10
# Allocators keep a few pages here and there. A leak of one picture per hundred bad ones would be tens of MB.
MOST_GROWTH_MIB = 4.0


class Sample(NamedTuple):
    seconds: float
    images: int
    resident_mib: float
    threads: int
    files: int
    children: int
    shared_mib: float


def settle() -> None:
    """Gives back what is not in use, so that what is counted is; lets the threads end that were told to."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    time.sleep(0.05)


def sample(began: float, images: int) -> Sample:
    settle()
    status = Path("/proc/self/status").read_text()
    resident, threads = (int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "Threads"))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    shared = shutil.disk_usage("/dev/shm").used / 2**20
    return Sample(
        time.monotonic() - began,
        images,
        resident / 1024,
        threads,
        len(os.listdir("/proc/self/fd")),
        len(children),
        shared,
    )


def data(folder: Path) -> dict[str, Path]:
    """The set as files, shards and .beton; the broken pictures are broken in each."""
    write_demo(folder / "demo", images=IMAGES, val_images=0, progress=lambda line: None)
    files, index = folder / "demo" / "train", FolderIndex(folder / "demo" / "train")
    found = {"folder": files, "tar": folder / "tar", "ffcv": folder / "x.beton"}
    pack(index, found["tar"], to="tar", progress=lambda line: None)
    pack(index, found["ffcv"], to="beton", progress=lambda line: None)
    for i in range(0, IMAGES, 100):
        path = Path(index.path(i))
        path.write_bytes(path.read_bytes()[:-500])
    for kind in ("tar", "ffcv"):
        for i, span in enumerate(open_index(found[kind], kind).encoded(range(IMAGES))):
            if i % 100 == 0:
                with open(span.path, "r+b") as file:
                    file.seek(span.offset)
                    file.write(b"<html>")
    return found


def soak(seconds: float, duty: float) -> list[Sample]:
    samples, images, began = [], 0, time.monotonic()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sets = data(Path(folder))
        options = {"batch_size": BATCH, "on_bad_image": "skip", "bad_image_budget": 1.0}
        loaders = [
            make_loader(kind, CROPS, data=path, **options, **parallel)[0]
            for kind, path in sets.items()
            for parallel in ({"threads": 2}, {"workers": 1}, {"workers": 0})
        ]
        places = [(0, 0)] * len(loaders)
        reader = EvalReader(
            sets["tar"] and open_index(sets["tar"]), (96, 96), on_bad_image="skip", threads=2, limit=100
        )
        turn = 0
        while time.monotonic() - began < seconds:
            for k, loader in enumerate(loaders):
                started = time.monotonic()
                epoch, step = places[k]
                if rng.integers(8) == 0:
                    epoch, step = epoch + 1, int(rng.integers(loader.steps_per_epoch))
                if rng.integers(8) == 0:
                    low, high = np.sort(rng.random((2, IMAGES, 2), dtype=np.float32), 0)
                    loader.set_boxes(np.concatenate([low, high], 1))
                batches = loader.epoch(epoch, step)
                for _ in range(min(STEPS, loader.steps_per_epoch - step)):
                    images += len(next(batches).ids)
                    step += 1
                places[k] = (epoch, step) if step < loader.steps_per_epoch else (epoch + 1, 0)
                time.sleep((time.monotonic() - started) * (1 / duty - 1))
            images += sum(len(batch.ids) for batch in reader)
            turn += 1
            for loader in loaders:  # the same state at each sample: nothing is under way
                loader.close()
            samples.append(sample(began, images))
    return samples


def table(samples: list[Sample], duty: float) -> tuple[str, bool]:
    """Markdown, and whether nothing grew."""
    steady = samples[len(samples) // 5 :]
    third = max(1, len(steady) // 3)
    resident = [s.resident_mib for s in steady]
    growth = float(np.median(resident[-third:]) - np.median(resident[:third]))
    slope = float(np.polyfit([s.seconds / 3600 for s in steady], resident, 1)[0]) if len(steady) > 2 else 0.0
    counts = {name: [getattr(s, name) for s in steady] for name in ("threads", "files", "children")}
    # At a sample a thread may be on its way out: once is no growth.
    is_flat = growth < MOST_GROWTH_MIB and all(
        statistics.median(v[:third]) == statistics.median(v[-third:]) for v in counts.values()
    )
    versions = f"{available_cores()} cores, Python {platform.python_version()}, torch {torch.__version__}; {native_decode.choose()[1]}"
    lines = [
        "# Loaders over time", "", f"Written by `python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}` on {time.strftime('%Y-%m-%d')}. {versions}.", "",
        __doc__.split("\n\n", 2)[2].strip(), "",
        f"{samples[-1].seconds / 60:.1f} minutes, {len(samples)} rounds, {samples[-1].images} images, duty {duty:g}. Nothing grew: {'yes' if is_flat else 'NO'}.", "",
        "| after | images | resident MiB | threads | open files | worker processes | /dev/shm MiB |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for i in np.unique(np.linspace(0, len(samples) - 1, 12).round().astype(int)):
        s = samples[i]
        lines.append(
            f"| {s.seconds:.0f} s | {s.images} | {s.resident_mib:.1f} | {s.threads} | {s.files} | {s.children} | {s.shared_mib:.1f} |"
        )
    lines += [
        "",
        f"After warm-up: resident memory {min(resident):.1f} to {max(resident):.1f} MiB, its last third {growth:+.2f} MiB "
        f"above the first (slope {slope:+.1f} MiB per hour); threads {span(counts['threads'])}, open files {span(counts['files'])}, worker processes {span(counts['children'])}.",
    ]
    return "\n".join(lines) + "\n", is_flat


def span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--duty", type=float, default=1.0, help="share of the time to work; rest for the remainder")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, is_flat = table(soak(60 * arguments.minutes, arguments.duty), arguments.duty)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    sys.exit(0 if is_flat else 1)


if __name__ == "__main__":
    main()
