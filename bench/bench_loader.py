"""Loaders side by side: CPU time per image, workers and threads included, and images per second.

`python bench/bench_loader.py --photos DIR --write bench/results/loaders-cpu` for the whole comparison, or
`pytest bench/bench_loader.py -s` for a short run.

All contenders give random resized crops of 224 px (scale 0.08..1; bicubic with antialiasing, but for FFCV, which has
area averages alone, and where a row says otherwise) as uint8 batches of 64, from a warm cache, with a worker or thread
per core. Each lives in processes of its own, which are stopped while others run. They take turns, several rounds; a row
holds medians, a ratio is the median of the rounds' ratios. CPU time per image is the figure to compare, images per second
is what a trainer would get here and now.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, count
from pathlib import Path

import other_loaders
import pytest
import torch
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.demo import DemoSpec, write_demo
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.pack import pack
from other_loaders import BATCH, SCALE, SIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the workers' CPU time")

CROP = CropSpec((SIZE, SIZE), scale=SCALE)
# As ImageNet's: 500 x 375 and the like, some 100 kB.
PHOTO_SIZE = DemoSpec(short_side_px=(333, 375), grain=(5.0, 20.0))
WARM_UP_BATCHES = 8
ROOT = Path(__file__).resolve().parents[1]
# The smallest model on whole crops: what asks most of a loader.
TRAINING = ["--method", "mae", "--preset", "demo", "--model", "vit_pico", "--image-size", "224", "--patch-size", "16", "--device", "cpu",
            "--batch-size", "64", "--steps", "40", "--log-every", "8", "--save-every", "40st"]  # fmt: skip
PATIENCE_S, LEAST_ROUNDS = 10, 3
PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu13",
    "ffcv",
    "webdataset",
    "torchvision",
)
BASE, DALI, FFCV = "Pillow + DataLoader", "DALI, CPU", "FFCV, same bytes"
FOLDER, BETON, PACKED = "fastmim folder", "fastmim beton, same bytes", "fastmim beton, max side 500 q90"
# What we promise: (ours, theirs, at least so many times).
BARS = ((FOLDER, BASE, 2.0), (FOLDER, DALI, 1.7), (BETON, FFCV, 1.4), (PACKED, BASE, 2.5))


@contextmanager
def ours(data: Path, name: str = "auto", decoder: str = "native") -> Iterator[Iterator[int]]:
    os.environ[native_decode.VARIABLE] = decoder
    parallel = {"workers": None} if name != "auto" else {"threads": available_cores()}
    if decoder == "pillow":
        parallel = {"workers": available_cores()}
    loader, _ = make_loader(name, (CROP,), data=data, batch_size=BATCH, **parallel)
    yield (len(batch.ids) for batch in chain.from_iterable(map(loader.epoch, count())))
    loader.close()


def contenders_of(folder: Path, packed: Path) -> dict[str, Callable]:
    """Contenders by name; the first is what the others are compared with."""
    index, quiet = open_index(folder), lambda line: None
    pack(index, packed / "tar", to="tar", progress=quiet)
    pack(index, packed / "same.beton", to="beton", progress=quiet)
    for name, resize in (("max500", ("max", 500)), ("short256", ("short", 256))):
        pack(index, packed / f"{name}.beton", to="beton", resize=resize, quality=90, progress=quiet)
    pack(index, packed / "max500", to="tar", resize=("max", 500), quality=90, progress=quiet)
    contenders = {BASE: partial(other_loaders.pillow, folder)}
    if native_decode.load()[0] is not None:
        contenders |= {
            FOLDER: partial(ours, folder),
            "fastmim tar, same bytes": partial(ours, packed / "tar"),
            BETON: partial(ours, packed / "same.beton"),
            "fastmim tar, max side 500 q90": partial(ours, packed / "max500"),
            PACKED: partial(ours, packed / "max500.beton"),
            "fastmim beton, short side 256 q90": partial(ours, packed / "short256.beton"),
        }
    return contenders | {
        "fastmim folder, Pillow forced": partial(ours, folder, decoder="pillow"),
        DALI: partial(other_loaders.dali, folder),
        "DALI, CPU, triangular filter": partial(other_loaders.dali, folder, "TRIANGULAR"),
        "fastmim dali, CPU": partial(ours, folder, "dali"),
        "fastmim nvimgcodec, CPU": partial(ours, folder, "nvimgcodec"),
        FFCV: partial(other_loaders.ffcv, packed / "same.beton"),
        "FFCV, max side 500 q90": partial(other_loaders.ffcv, packed / "max500.beton"),
        "webdataset, same bytes": partial(other_loaders.webdataset, packed / "tar"),
        "torchvision v2 + DataLoader": partial(other_loaders.torchvision, folder),
    }


# -- measuring ---------------------------------------------------------------------------------------------------------


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


def compare(folder: Path, images: int, rounds: int, only: str = "") -> tuple[list[dict], dict[str, str]]:
    """One row per contender with its figures of each round, and why others are missing.

    Args:
        only: measure contenders whose names match this regular expression, and the first.
    """
    running: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    figures: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as packed:
        try:
            for name, make in contenders_of(folder, Path(packed)).items():
                if name != BASE and not re.search(only, name):
                    continue
                running[name] = contender = Contender(make)
                if contender.error is not None:
                    missing[name] = contender.error
                    running.pop(name).close()
            for _ in range(rounds):
                for name, contender in running.items():
                    figures.setdefault(name, []).append(contender.measure(images))
        finally:
            for contender in running.values():
                contender.close()
    return [
        {"loader": name, "cpu_ms": [round(cost, 4) for cost, _ in pairs], "images_per_s": [round(rate, 1) for _, rate in pairs]}
        for name, pairs in figures.items()
    ], missing  # fmt: skip


# -- in training -------------------------------------------------------------------------------------------------------


def in_training(folder: Path) -> tuple[str, list[dict]]:
    """A Markdown table of real runs, how fast they were and how much of their time they waited for data; and its rows."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / "max500.beton"
        pack(open_index(folder), packed, to="beton", resize=("max", 500), quality=90, progress=lambda line: None)
        for name, data, more, decoder in (
            ("fastmim folder", folder, [], ""),
            ("fastmim folder, Pillow forced", folder, [], "pillow"),
            ("fastmim beton, max side 500 q90", packed, [], ""),
            ("synthetic", folder, ["--loader", "synthetic"], ""),
        ):
            out = Path(temporary) / name.replace(" ", "-")
            command = [sys.executable, str(ROOT / "fastmim" / "train.py"), "--data", str(data), "--out", str(out)]
            paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")])
            env = {**os.environ, "PYTHONPATH": paths, native_decode.VARIABLE: decoder}
            env.pop("OMP_NUM_THREADS", None)  # the trainer chooses
            done = subprocess.run([*command, *TRAINING, *more], env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            timed = [record for record in records if "data_wait" in record][1:]  # the first interval starts everything
            rows.append({"loader": name, "images_per_s": [round(r["images_per_s"], 1) for r in timed],
                         "data_wait": [round(r["data_wait"], 4) for r in timed]})  # fmt: skip
    lines = ["| loader | images/s | waiting for data |", "|---|---|---|"]
    for row in rows:
        rate, wait = (statistics.median(row[key]) for key in ("images_per_s", "data_wait"))
        lines.append(f"| {row['loader']} | {rate:.0f} | {wait:.1%} |")
    return "\n".join(lines), rows


# -- telling -----------------------------------------------------------------------------------------------------------


def ratio(rows: dict[str, dict], ours: str, theirs: str, key: str) -> float:
    """How many times better the first is; the median of the rounds' ratios."""
    pairs = list(zip(rows[ours][key], rows[theirs][key]))
    return statistics.median(b / a if key == "cpu_ms" else a / b for a, b in pairs)


def table(rows: list[dict], missing: dict[str, str]) -> str:
    """Markdown."""
    lines = [
        "| loader | CPU ms/image (lowest..highest) | less than Pillow's | images/s | more |",
        "|---|---|---|---|---|",
    ]
    by_name = {row["loader"]: row for row in rows}
    for name, row in by_name.items():
        costs, rates = row["cpu_ms"], row["images_per_s"]
        cost, rate = statistics.median(costs), statistics.median(rates)
        spread = f"({min(costs):.2f}..{max(costs):.2f})"
        ratios = [f"{ratio(by_name, name, BASE, key):.2f} x" for key in ("cpu_ms", "images_per_s")]
        lines.append(f"| {name} | {cost:.2f} {spread} | {ratios[0]} | {rate:.0f} | {ratios[1]} |")
    if len(rows[0]["cpu_ms"]) < LEAST_ROUNDS:  # too short to tell
        return "\n".join(lines)
    lines += ["", "| promise | at least | CPU time | images/s | kept |", "|---|---|---|---|---|"]
    for ours_name, theirs, least in BARS:
        if ours_name not in by_name or theirs not in by_name:
            continue
        cpu, rate = (ratio(by_name, ours_name, theirs, key) for key in ("cpu_ms", "images_per_s"))
        kept = "yes" if min(cpu, rate) >= least else "no"
        lines.append(f"| {ours_name} : {theirs} | {least:g} x | {cpu:.2f} x | {rate:.2f} x | {kept} |")
    lines += ["", *(f"Not measured: {name} ({reason[:160]})." for name, reason in missing.items())]
    return "\n".join(lines).rstrip()


def setting() -> dict[str, str]:
    """What the figures depend on."""
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
    git = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{available_cores()} cores, {processor or platform.machine()}, load {os.getloadavg()[0]:.1f} before",
        "decoder": native_decode.choose()[1],
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
        "commit": git.stdout.strip() or "unknown",
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(os.path.basename, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(folder: Path, images: int, rounds: int) -> str:
    index = FolderIndex(folder)
    sizes = [os.stat(index.path(i)).st_size / 1000 for i in range(len(index))]
    return f"{len(sizes)} files, {statistics.mean(sizes):.0f} kB on average; n = {rounds} rounds of {images} images."


# -- data --------------------------------------------------------------------------------------------------------------


def synthetic_photos(folder: Path, images: int) -> Path:
    write_demo(folder, images=images, val_images=0, spec=PHOTO_SIZE, progress=lambda line: None)
    return folder / "train"


def repeated(folder: Path, temporary: Path, least: int = 400) -> Path:
    """A folder of at least so many images: copies of the images of a folder, again and again if they are few."""
    index = FolderIndex(folder)
    for turn in range(-(-least // len(index))):
        (temporary / str(turn)).mkdir(parents=True)
        for i in range(len(index)):
            shutil.copyfile(index.path(i), temporary / str(turn) / f"{i:07d}{Path(index.path(i)).suffix}")
    return temporary


def bench_loader(tmp_path, capsys):
    """A few images of the demo set's kind; numbers are printed, never asserted: they belong to the machine."""
    photos = os.environ.get("FASTMIM_BENCH_PHOTOS")
    folder = repeated(Path(photos), tmp_path / "photos", 128) if photos else synthetic_photos(tmp_path, 96)
    images, rounds = int(os.environ.get("FASTMIM_BENCH_IMAGES", 192)), 2
    rows, missing = compare(folder, images, rounds)
    with capsys.disabled():
        print(f"\n{setting()['machine']}: {describe(folder, images, rounds)}\n{table(rows, missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of real photographs to compare on, too")
    parser.add_argument("--only-photos", action="store_true")
    parser.add_argument(
        "--train", action="store_true", help="train on the photographs, too, and tell the share of waiting"
    )
    parser.add_argument("--only", default="", help="regular expression: contenders to measure beside the first")
    parser.add_argument("--images", type=int, default=768, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="write FILE.md and FILE.jsonl")
    arguments = parser.parse_args()
    about = setting()
    sections = [
        "# Loaders on a CPU",
        f"Written by `{about['command']}` on {about['date']}, commit {about['commit']}. {about['machine']}; {about['versions']}; {about['decoder']}.",
        __doc__.split("\n\n", 2)[2].strip(),
    ]
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        if arguments.photos:
            folders["Photographs"] = repeated(arguments.photos, Path(temporary) / "photos")
        if not arguments.only_photos:
            folders["Drawn pictures of the size of ImageNet's"] = synthetic_photos(Path(temporary) / "synthetic", 400)
        for title, folder in folders.items():
            only = arguments.only or (
                "" if title == "Photographs" else f"^fastmim folder$|^fastmim .*beton|^{DALI}$|^{FFCV}$"
            )
            rows, missing = compare(folder, arguments.images, arguments.rounds, only)
            about_data = describe(folder, arguments.images, arguments.rounds)
            sections.append(f"## {title}\n\n{about_data}\n\n{table(rows, missing)}")
            records += [
                {"data": title, **row, "n": arguments.rounds, "images": arguments.images, **about} for row in rows
            ]
            print(sections[-1], flush=True)
        if arguments.train and arguments.photos:
            text, rows = in_training(folders["Photographs"])
            flags = " ".join(TRAINING)
            sections.append(
                f"## In training\n\nMedians of the intervals of one run each, without the first: `fastmim train {flags}` on the photographs; the "
                f"loader and the model share the cores.\n\n{text}"
            )
            print(sections[-1], flush=True)
            records += [{"data": "in training", **row, "n": 1, **about} for row in rows]
    if arguments.write:
        arguments.write.with_suffix(".md").write_text("\n\n".join(sections) + "\n")
        arguments.write.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
