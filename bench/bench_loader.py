"""Loaders side by side: CPU time per image, workers and threads included, and images per second.

`python bench/bench_loader.py [--photos DIR] [--out FILE]`, or `pytest bench/bench_loader.py -s` for a short run.

All contenders give random resized crops of 224 px (scale 0.08..1, bicubic with antialiasing) as uint8 batches of 64, from
a warm cache. They run in turns, several rounds; medians are told. CPU time per image is the figure to compare, images per
second is what a trainer would get here and now. Numbers are printed, never asserted: they belong to the machine and its
other load.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.demo import DemoSpec, write_demo
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.pack import pack
from fastmim_pipelines.sampling import crop_box
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the workers' CPU time")

SIZE, SCALE, BATCH = 224, (0.08, 1.0), 64
CROP = CropSpec((SIZE, SIZE), scale=SCALE)
# As ImageNet's: 500 x 375 and the like, some 100 kB.
PHOTO_SIZE = DemoSpec(short_side_px=(333, 375), grain=(5.0, 20.0))
WARM_UP_BATCHES = 8


class PillowCrops(Dataset):
    """What a user writes: open, convert, crop and resize in one call of Pillow, to a tensor."""

    def __init__(self, folder: Path):
        self.index = FolderIndex(folder)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.index.path(i)).convert("RGB")
        epoch = int(torch.randint(1 << 30, ()))
        left, top, width, height = crop_box(0, epoch, i, 0, *image.size, SCALE, CROP.ratio)
        box = (left, top, left + width, top + height)
        pixels = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@contextmanager
def pillow_and_dataloader(folder: Path) -> Iterator[Iterator[int]]:
    data = PillowCrops(folder)
    sampler = RandomSampler(data, replacement=True, num_samples=1 << 30)
    loader = DataLoader(data, BATCH, sampler=sampler, num_workers=available_cores(), drop_last=True)
    iterator = iter(loader)
    yield (len(batch) for batch in iterator)
    iterator._shutdown_workers()


@contextmanager
def ours(data: Path, decoder: str = "native", threads: int | None = None) -> Iterator[Iterator[int]]:
    os.environ[native_decode.VARIABLE] = decoder
    parallel = {"workers": available_cores()} if decoder == "pillow" else {"threads": threads or available_cores()}
    loader, _ = make_loader("auto", (CROP,), data=data, batch_size=BATCH, **parallel)
    del os.environ[native_decode.VARIABLE]  # a loader asks when it is made
    yield (len(batch.ids) for batch in chain.from_iterable(map(loader.epoch, count())))
    loader.close()


@contextmanager
def ffcv_itself(data: Path) -> Iterator[Iterator[int]]:
    """Its own order and boxes; INTER_AREA instead of bicubic."""
    decoders, transforms = (importlib.import_module(f"ffcv.{name}") for name in ("fields.rgb_image", "transforms"))
    module = importlib.import_module("ffcv.loader")
    image = [
        decoders.RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]
    options = {"num_workers": available_cores(), "os_cache": True, "drop_last": True}
    pipelines = {"image": image, "label": None}
    loader = module.Loader(str(data), batch_size=BATCH, order=module.OrderOption.RANDOM, pipelines=pipelines, **options)
    yield (len(batch[0]) for batch in chain.from_iterable(loader for _ in count()))


def cpu_seconds() -> float:
    """CPU time so far of this process and of its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(batches: Iterator[int], images: int) -> tuple[float, float]:
    """CPU milliseconds per image and images per second of a loader that runs at its pace."""
    for _ in range(WARM_UP_BATCHES):  # what it has prefetched while others ran
        next(batches)
    began, cpu_began, seen = time.perf_counter(), cpu_seconds(), 0
    while seen < images:
        seen += next(batches)
    return 1000 * (cpu_seconds() - cpu_began) / seen, seen / (time.perf_counter() - began)


def contenders_of(folder: Path, packed: Path) -> dict[str, Callable]:
    """Contenders by name; the first is what the others are compared with."""
    index, quiet = open_index(folder), lambda line: None
    pack(index, packed / "tar", to="tar", progress=quiet)
    pack(index, packed / "same.beton", to="beton", progress=quiet)
    pack(index, packed / "max500.beton", to="beton", resize=("max", 500), quality=90, progress=quiet)
    pack(index, packed / "short256.beton", to="beton", resize=("short", 256), quality=90, progress=quiet)
    contenders = {"Pillow + DataLoader": partial(pillow_and_dataloader, folder)}
    contenders["fastmim folder, Pillow forced"] = partial(ours, folder, "pillow")
    if native_decode.load()[0] is None:
        return contenders
    contenders |= {
        "fastmim folder": partial(ours, folder),
        "fastmim tar, same bytes": partial(ours, packed / "tar"),
        "fastmim beton, same bytes": partial(ours, packed / "same.beton"),
        "fastmim beton, max side 500 q90": partial(ours, packed / "max500.beton"),
        "fastmim beton, short side 256 q90": partial(ours, packed / "short256.beton"),
    }
    if importlib.util.find_spec("ffcv") is not None:
        contenders["FFCV, same bytes"] = partial(ffcv_itself, packed / "same.beton")
        contenders["FFCV, max side 500 q90"] = partial(ffcv_itself, packed / "max500.beton")
    return contenders


def compare(folder: Path, images: int, rounds: int) -> str:
    """A Markdown table."""
    index = FolderIndex(folder)
    kilobytes = sum(os.stat(index.path(i)).st_size for i in range(len(index))) / len(index) / 1000
    results: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as packed, ExitStack() as loaders:
        contenders = contenders_of(folder, Path(packed))
        running = {name: loaders.enter_context(contender()) for name, contender in contenders.items()}
        for _ in range(rounds):
            for name, batches in running.items():
                results.setdefault(name, []).append(measure(batches, images))
    base, base_rate = (statistics.median(values) for values in zip(*next(iter(results.values()))))
    lines = [
        f"{len(index)} files, {kilobytes:.0f} kB on average; {rounds} rounds of {images} images each.",
        "",
        "| loader | CPU ms/image (lowest..highest) | x | images/s | x |",
        "|---|---|---|---|---|",
    ]
    for name, pairs in results.items():
        costs, rates = zip(*pairs)
        cost, rate = statistics.median(costs), statistics.median(rates)
        lines.append(
            f"| {name} | {cost:.2f} ({min(costs):.2f}..{max(costs):.2f}) | {base / cost:.2f} | {rate:.0f} | {rate / base_rate:.2f} |"
        )
    return "\n".join(lines)


def synthetic_photos(folder: Path, images: int) -> Path:
    write_demo(folder, images=images, val_images=0, spec=PHOTO_SIZE, progress=lambda line: None)
    return folder / "train"


def repeated(folder: Path, temporary: Path, least: int = 400) -> Path:
    """A folder of at least so many images: links to the images of a folder, again and again if they are few."""
    index = FolderIndex(folder)
    for copy in range(-(-least // len(index))):
        (temporary / str(copy)).mkdir(parents=True)
        for i in range(len(index)):
            path = Path(index.path(i)).resolve()
            (temporary / str(copy) / f"{i:07d}{path.suffix}").symlink_to(path)
    return temporary


def machine() -> str:
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}, NumPy {np.__version__}"
    return f"{available_cores()} cores ({processor or platform.machine()}), {versions}; {native_decode.choose()[1]}"


@pytest.mark.parametrize("source", ["synthetic", "photos"])
def bench_loader(source, tmp_path, capsys):
    torch.set_num_threads(1)
    photos = os.environ.get("FASTMIM_BENCH_PHOTOS")
    if source == "photos" and not photos:
        pytest.skip("set FASTMIM_BENCH_PHOTOS to a folder of images")
    folder = repeated(Path(photos), tmp_path, 128) if source == "photos" else synthetic_photos(tmp_path, 128)
    table = compare(folder, int(os.environ.get("FASTMIM_BENCH_IMAGES", 256)), 3)
    with capsys.disabled():
        print(f"\n{source}, {machine()}: {table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of real photographs to compare on, too")
    parser.add_argument("--only-photos", action="store_true")
    parser.add_argument("--images", type=int, default=640, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sections = [f"# Loaders on a CPU\n\n`python {' '.join(sys.argv)}`, {time.strftime('%Y-%m-%d')}. {machine()}."]
    sections.append(__doc__.split("\n\n", 2)[2].strip())
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        if not arguments.only_photos:
            folders["Synthetic, of the size of ImageNet's"] = synthetic_photos(Path(temporary) / "synthetic", 400)
        if arguments.photos:
            folders["Photographs"] = repeated(arguments.photos, Path(temporary) / "photos")
        for title, folder in folders.items():
            sections.append(f"## {title}\n\n{compare(folder, arguments.images, arguments.rounds)}")
            print(sections[-1], flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
