"""The same sample and box through every decoder: how far its pixels are from Pillow's. Keeps the table of docs/data.md.

`FASTMIM_WRITE_PARITY=1 pytest tests/pipelines/test_pipeline_parity.py` writes the table anew; rows of what is not
installed stay. Without the variable the figures are computed again and compared with the table.
"""

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.decode import read_bytes, read_picture
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.pack import pack
from fastmim_pipelines.sampling import crop_box
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- parity table: begin -->", "<!-- parity table: end -->"
SIDE, EPOCHS, SCALE, RATIO = 224, 2, (0.08, 1.0), (3 / 4, 4 / 3)
CPU_BOUND, GPU_BOUND = 1.0, 2.0  # gray levels of 255, on average over a set of pictures
SLACK = 0.02  # other versions of the libraries round otherwise


def reference(index, sample_id: int, epoch: int, filter: str = "bicubic") -> np.ndarray:
    """Pillow, full-size decode, antialiased: int (3, SIDE, SIDE)."""
    picture = read_picture(index.encoded([sample_id])[0], 3, index.path(sample_id))
    return picture.crop(_box(sample_id, epoch, picture.width, picture.height), (SIDE, SIDE), filter).astype(int)


def _box(sample_id: int, epoch: int, width: int, height: int) -> tuple[int, int, int, int]:
    return crop_box(0, epoch, sample_id, 0, width, height, SCALE, RATIO)


def by_loader(name: str, filter: str = "bicubic", **environment: str) -> Callable:
    def samples(index, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        before = os.environ.get(native_decode.VARIABLE)
        os.environ[native_decode.VARIABLE] = environment.get("decoder", "")
        try:
            loader, _ = make_loader(
                name, (CropSpec((SIDE, SIDE), SCALE, RATIO, filter=filter),), data=index, batch_size=1
            )
        finally:
            os.environ.pop(native_decode.VARIABLE)
            if before is not None:
                os.environ[native_decode.VARIABLE] = before
        for epoch in range(EPOCHS):
            for batch in loader.epoch(epoch):
                yield batch.crops[0][0].cpu().numpy().astype(int), reference(index, int(batch.ids[0]), epoch, filter)
        loader.close()

    return samples


def by_function(crop: Callable[[np.ndarray, tuple], np.ndarray]) -> Callable:
    """Of the whole picture, decoded by Pillow, as (height, width, 3)."""

    def samples(index, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for epoch in range(EPOCHS):
            for i in range(len(index)):
                pixels = np.asarray(read_picture(index.encoded([i])[0], 3, index.path(i)).planes[0])
                box = _box(i, epoch, pixels.shape[1], pixels.shape[0])
                yield crop(pixels, box).astype(int), reference(index, i, epoch)

    return samples


def torch_crop(pixels: np.ndarray, box: tuple) -> np.ndarray:
    left, top, width, height = box
    region = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(region, (SIDE, SIDE), mode="bicubic", antialias=True)[0].numpy()


def ffcv_crop(pixels: np.ndarray, box: tuple) -> np.ndarray:
    left, top, width, height = box
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    resize_crop = importlib.import_module("ffcv.libffcv").resize_crop
    resize_crop(np.ascontiguousarray(pixels), top, top + height, left, left + width, out)
    return out.transpose(2, 0, 1)


def by_packed(resize: tuple[str, int], quality: int) -> Callable:
    """Crops of a packed set against those of its originals: the same share of the picture, other pixels."""

    def samples(index, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        target = folder / f"{resize[0]}{resize[1]}"
        pack(index, target, to="tar", resize=resize, quality=quality, workers=0, progress=lambda line: None)
        packed = open_index(target)
        for epoch in range(EPOCHS):
            for i in range(len(index)):
                whole = Image.open(index.path(i))
                small = read_picture(read_bytes(packed.encoded([i])[0]), 3)
                box = _box(i, epoch, *whole.size)
                ratios = (small.width / whole.width, small.height / whole.height) * 2
                scaled = tuple(value * ratio for value, ratio in zip(box, ratios))
                yield small.crop(scaled, (SIDE, SIDE)).astype(int), reference(index, i, epoch)

    return samples


# name -> (what must be installed, how to get samples, bound of the mean or None where another filter is no mistake)
ROWS: dict[str, tuple[str, Callable, float | None]] = {
    "native decoder (default), bicubic": ("", by_loader("folder"), 0.0),
    "native decoder, lanczos": ("", by_loader("folder", "lanczos"), 0.0),
    "Pillow (`FASTMIM_DECODE=pillow`), bicubic": ("", by_loader("folder", decoder="pillow"), 0.0),
    "dali, CPU": ("nvidia.dali", by_loader("dali"), CPU_BOUND),
    "nvimgcodec, CPU": ("nvidia.nvimgcodec", by_loader("nvimgcodec"), CPU_BOUND),
    "torch's antialiased bicubic (torchvision v2 on tensors)": ("", by_function(torch_crop), CPU_BOUND),
    "FFCV's own resize (area average)": ("ffcv", by_function(ffcv_crop), None),
    "packed with `--resize max:500`, against the originals": ("", by_packed(("max", 500), 90), None),
    "packed with `--resize short:256`, against the originals": ("", by_packed(("short", 256), 90), None),
}


def is_installed(module: str) -> bool:
    try:
        return not module or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def measured(samples: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, int]:
    """Mean distance, that of the worst picture, and the largest of a pixel, in gray levels."""
    means, largest = [], 0
    for got, expected in samples:
        distance = np.abs(got - expected)
        means.append(distance.mean())
        largest = max(largest, int(distance.max()))
    return float(np.mean(means)), float(np.max(means)), largest


def committed() -> dict[str, dict[str, tuple[float, float, int]]]:
    """Row -> column -> figures."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    return {
        line[0]: {name: _figures(cell) for name, cell in zip(head[1:], line[1:]) if cell.strip() != "-"}
        for line in lines
    }


def _figures(cell: str) -> tuple[float, float, int]:
    mean, worst, largest = re.fullmatch(r"([\d.]+) / ([\d.]+) / (\d+)", cell.strip()).groups()
    return float(mean), float(worst), int(largest)


def write(table: dict[str, dict[str, tuple[float, float, int]]]) -> None:
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = [f"| decoder | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in ROWS:
        if name in table:
            cells = ["{:.3f} / {:.3f} / {}".format(*table[name][c]) if c in table[name] else "-" for c in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + rest.split(END)[1])


@pytest.fixture(params=["drawn", "photographs"])
def pictures(request, demo_set) -> tuple[str, FolderIndex]:
    folder = demo_set / "train" if request.param == "drawn" else request.getfixturevalue("photographs") / "photos"
    index = FolderIndex(folder)
    return f"{len(index)} {'drawn pictures' if request.param == 'drawn' else 'photographs'}", index


@pytest.mark.parametrize("name", ROWS)
def test_distance_to_pillow_is_that_of_the_table(name, pictures, tmp_path):
    package, samples, bound = ROWS[name]
    if not is_installed(package):
        pytest.skip(f"{package} is not installed")
    column, index = pictures
    mean, worst, largest = measured(samples(index, tmp_path))
    table = committed()
    if os.environ.get("FASTMIM_WRITE_PARITY"):
        table.setdefault(name, {})[column] = mean, worst, largest
        write(table)
    if package.startswith("nvidia") and torch.cuda.is_available():  # the table is of CPUs
        assert mean <= GPU_BOUND
        return
    told = table[name][column]
    assert bound is None or mean <= bound, f"mean distance {mean:.3f} of 255"
    assert mean <= told[0] + SLACK and worst <= told[1] + 5 * SLACK and (largest == 0) == (told[2] == 0)
    assert mean >= told[0] - 5 * SLACK, f"better than the table says: {mean:.3f}; write it anew"
