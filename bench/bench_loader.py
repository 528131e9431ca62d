"""Loaders side by side: CPU time per image, workers and threads included, and images per second.

`fastmim bench loader --photos DIR --json bench/results/loaders-cpu.jsonl` for the whole comparison, or
`pytest bench/bench_loader.py -s` for a short run. A broken run goes on where it stopped.

All contenders give random resized crops of 224 px (scale 0.08..1; bicubic with antialiasing, but for FFCV, which has
area averages alone, and where a row says otherwise) as uint8 batches of 64, from a warm cache, with a worker or thread
per core. Each lives in processes of its own, which are stopped while others run. They take turns, several rounds; a row
holds medians, a ratio is the median of the rounds' ratios. CPU time per image is the figure to compare, images per second
is what a trainer would get here and now.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path

import loader_report
import other_loaders
import report
from contenders import Contender
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.pack import pack
from loader_report import BASE, BETON, DALI, FFCV, FOLDER, PACKED
from machine import commit
from other_loaders import BATCH, SCALE, SIZE
from photos import drawn, repeated
from points import Points

from fastmim.bench import Parser, at_least, exit_code, results_file
from fastmim.config import ConfigError

CROP = CropSpec((SIZE, SIZE), scale=SCALE)
ROOT = Path(__file__).resolve().parents[1]
# The smallest model on whole crops: what asks most of a loader.
TRAINING = ["--method", "mae", "--preset", "demo", "--model", "vit_pico", "--image-size", "224", "--patch-size", "16", "--device", "cpu",
            "--batch-size", "64", "--steps", "40", "--log-every", "8", "--save-every", "40st"]  # fmt: skip
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
PHOTOS, DRAWN = "Photographs", "Drawn pictures of the size of ImageNet's"
# What a short run has: regular expression.
QUICK = f"^fastmim folder$|^{BETON}$|^{DALI}$|^{FFCV}$|^torchvision"


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


def compare(title: str, folder: Path, images: int, rounds: int, points: Points, only: str = "") -> None:
    """Adds a record per loader and round to the file, and one per loader that is missing, with the reason.

    Args:
        title: of the data.
        only: measure contenders whose names match this regular expression, and the first.
    """
    counts = rounds_of(points, title)
    if counts and min(counts.values()) >= rounds:
        print(f"{title}: in the file already")
        return
    about = {"suite": "loader", "data": title, "images": images, "files": describe(folder), **setting()}
    running: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as packed:
        try:
            for name, make in contenders_of(folder, Path(packed)).items():
                if name != BASE and not re.search(only, name):
                    continue
                running[name] = contender = Contender(make)
                if contender.error is not None:
                    points.add([{**about, "loader": name, "missing": contender.error}])
                    running.pop(name).close()
            for i in range(rounds):
                for name, contender in running.items():
                    if counts.get(name, 0) <= i:
                        cost, rate = contender.measure(images)
                        points.add(
                            [{**about, "loader": name, "cpu_ms": [round(cost, 4)], "images_per_s": [round(rate, 1)]}]
                        )
        finally:
            for contender in running.values():
                contender.close()


def rounds_of(points: Points, title: str) -> dict[str, int]:
    """Loader -> rounds that the file has."""
    return {row["loader"]: len(row["cpu_ms"]) for row in loader_report.rows(points.records, title)}


# -- in training -------------------------------------------------------------------------------------------------------


def in_training(folder: Path, points: Points) -> None:
    """Adds real runs: how fast they were, and how much of their time they waited for data."""
    known = {row["loader"] for row in loader_report.rows(points.records, loader_report.IN_TRAINING)}
    about = {"suite": "loader", "data": loader_report.IN_TRAINING, "flags": " ".join(TRAINING), **setting()}
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / "max500.beton"
        pack(open_index(folder), packed, to="beton", resize=("max", 500), quality=90, progress=lambda line: None)
        for name, data, more, decoder in (
            ("fastmim folder", folder, [], ""),
            ("fastmim folder, Pillow forced", folder, [], "pillow"),
            ("fastmim beton, max side 500 q90", packed, [], ""),
            ("synthetic", folder, ["--loader", "synthetic"], ""),
        ):
            if name in known:
                continue
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
            points.add([{**about, "loader": name, "images_per_s": [round(r["images_per_s"], 1) for r in timed],
                         "data_wait": [round(r["data_wait"], 4) for r in timed]}])  # fmt: skip


# -- telling -----------------------------------------------------------------------------------------------------------


def setting() -> dict[str, str]:
    """What the figures depend on."""
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
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
        "commit": commit(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *map(os.path.basename, sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(folder: Path) -> str:
    index = FolderIndex(folder)
    sizes = [os.stat(index.path(i)).st_size / 1000 for i in range(len(index))]
    return f"{len(sizes)} files, {statistics.mean(sizes):.0f} kB on average"


def bench_loader(tmp_path, results, capsys, told):
    """A few images of the demo set's kind; numbers are printed, never asserted: they belong to the machine."""
    if sys.platform != "linux":
        import pytest

        pytest.skip("/proc, which tells the workers' CPU time, is Linux's")
    photos = os.environ.get("FASTMIM_BENCH_PHOTOS")
    folder = repeated(Path(photos), tmp_path / "photos", 128) if photos else drawn(tmp_path, 96)
    points = Points(results / "loaders.jsonl")
    title = PHOTOS if photos else DRAWN
    with capsys.disabled():
        compare(title, folder, 512, 2, points, only=QUICK)
        print("\n" + loader_report.page(points.records))
    ms = {row["loader"]: row["cpu_ms"] for row in loader_report.rows(points.records, title)}
    told(
        [each / 1e3 for each in ms.get(FOLDER, ms[BASE])],
        {name: statistics.median(own) / 1e3 for name, own in ms.items()},
    )


def main() -> None:
    parser = Parser(prog="fastmim bench loader", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="where the lines go; what is in it is not run again"
    )
    parser.add_argument("--photos", type=Path, help="folder of real photographs to compare on, too")
    parser.add_argument("--only-photos", action="store_true")
    parser.add_argument(
        "--train", action="store_true", help="train on the photographs, too, and tell the share of waiting"
    )
    parser.add_argument("--only", default="", help="regular expression: contenders to measure beside the first")
    parser.add_argument("--images", type=at_least(1), default=768, help="images per measurement")
    parser.add_argument("--drawn", type=at_least(1), default=400, metavar="N", help="pictures to draw")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    arguments = parser.parse_args()
    if arguments.photos is not None and not arguments.photos.is_dir():
        raise ConfigError(f"--photos: expected a folder of photographs, found none at {arguments.photos}")
    if arguments.photos is None and (arguments.train or arguments.only_photos):
        raise ConfigError("--train, --only-photos: expected --photos with a folder of photographs")
    points = Points(arguments.json)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        if arguments.photos:
            folders[PHOTOS] = repeated(arguments.photos, Path(temporary) / "photos")
        if not arguments.only_photos:
            folders[DRAWN] = drawn(Path(temporary) / "drawn", arguments.drawn)
        for title, folder in folders.items():
            only = arguments.only or ("" if title == PHOTOS else f"^fastmim folder$|^fastmim .*beton|^{DALI}$|^{FFCV}$")
            compare(title, folder, arguments.images, arguments.rounds, points, only)
        if arguments.train and arguments.photos:
            in_training(folders[PHOTOS], points)
    print(loader_report.page(points.records))
    if arguments.json is not None:
        report.write_report(arguments.json)


if __name__ == "__main__":
    sys.exit(exit_code(main))
