"""DALI and nvImageCodec as decoders: our order and boxes, pixels near Pillow's, a bad image fails alone.

Run where the packages are installed (their CPU decoders need no GPU); elsewhere only how they are asked for is tested.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_pipelines import CropSpec, device_decode, make_loader, workers
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.spec import DataError
from PIL import Image

PACKAGES = {"dali": "nvidia.dali", "nvimgcodec": "nvidia.nvimgcodec"}
CROPS = (CropSpec((64, 72)), CropSpec((32, 32)), CropSpec((40, 40), scale=(0.1, 0.5), view=1))
# Against Pillow on the demo pictures and on photographs of 500 x 375, both libraries: at most 0.19 on average, 0.3 for
# the worst picture (DALI 2.4, nvImageCodec 0.9, CPU). Their edges differ most: weights beyond the box.
MEAN_LIMIT, PICTURE_LIMIT = 0.5, 1.0


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(params=PACKAGES)
def name(request):
    if not is_installed(PACKAGES[request.param]):
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.mark.parametrize("wanted", PACKAGES)
def test_missing_packages_are_told_with_the_command(demo_set, wanted, monkeypatch):
    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(device_decode, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"loader: {wanted} needs nvidia-.*; pip install nvidia-{wanted}-cu"):
        make_loader(wanted, CROPS, data=demo_set / "train", batch_size=4)


@pytest.mark.parametrize("wanted", PACKAGES)
def test_what_they_cannot_do_is_refused(demo_set, wanted):
    for options, message in (
        ({"in_chans": 1}, "has bicubic crops of 3 channels, got 1"),
        ({"workers": 2}, "workers: expected 0 or None, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make_loader(wanted, CROPS, data=demo_set / "train", batch_size=4, **options)
    with pytest.raises(ValueError, match="got lanczos and 3"):
        make_loader(wanted, (CropSpec((8, 8), filter="lanczos"),), data=demo_set / "train", batch_size=4)


def test_size_of_plain_jpeg_leaves_everything_else_to_pillow(demo_set, monkeypatch):
    path = next((demo_set / "train").rglob("*.jpg"))
    data = np.fromfile(path, np.uint8)
    for decoder in (device_decode.load, lambda: (None, "")):
        monkeypatch.setattr(device_decode, "load", decoder)
        size = device_decode.size_of_plain_jpeg
        assert size(data) == Image.open(path).size
        assert size(np.concatenate([data, np.zeros(100, np.uint8)])) == Image.open(path).size
        for bad in (data[:-300], data[:0], np.zeros(500, np.uint8), np.frombuffer(b"\xff\xd8\xff\xd9", np.uint8)):
            assert size(bad) is None
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert size(data) is None
        monkeypatch.undo()


def first(name, data, count=1, **options):
    loader, reason = make_loader(name, CROPS, data=data, batch_size=20, **options)
    try:
        return [batch for _, batch in zip(range(count), loader.epoch(1))], loader, reason
    finally:
        loader.close()


@pytest.fixture
def mixed(demo_set, tmp_path) -> Path:
    """The training pictures, some PNG, CMYK, gray or with a rotation in their EXIF data."""
    folder = tmp_path / "mixed"
    shutil.copytree(demo_set / "train", folder)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))[:12]):
        image, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6
        if i % 4 == 0:
            image.save(path, "PNG")
        elif i % 4 == 1:
            image.convert("CMYK").save(path, "JPEG")
        elif i % 4 == 2:
            image.convert("L").save(path, "JPEG", quality=95)
        else:
            image.save(path, "JPEG", quality=95, exif=exif)
    return folder


def test_pixels_are_near_those_of_pillow(name, mixed):
    expected, _, _ = first("folder", mixed, 3)
    got, _, reason = first(name, mixed, 3)
    assert reason.startswith(f"{name}, as asked for: {name} decodes on ")
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.ids, b.ids)
        for x, y in zip(a.crops, b.crops, strict=True):
            difference = (x.int() - y.int().cpu()).abs().float().mean((1, 2, 3))
            assert y.dtype == torch.uint8 and difference.mean() < MEAN_LIMIT and difference.max() < PICTURE_LIMIT


def test_bad_pictures_fail_alone(name, mixed):
    index = FolderIndex(mixed)
    spoiled = [0, 7, 20, 33]
    for sample_id, data in zip(spoiled, (b"", b"<html>", b"\xff\xd8\xff\xe0" + bytes(50) + b"\xff\xd9", None)):
        path = Path(index.path(sample_id))
        path.write_bytes(path.read_bytes()[:-200] if data is None else data)
    with pytest.raises(DataError, match=r"\(sample (0|7|20|33)\)"):
        first(name, mixed, 3)
    expected, plain, _ = first("folder", mixed, 3, on_bad_image="skip")
    got, loader, _ = first(name, mixed, 3, on_bad_image="skip")
    assert len(plain.bad_images) == 4 and loader.bad_images == plain.bad_images
    for a, b in zip(expected, got, strict=True):
        assert (a.crops[0].int() - b.crops[0].int().cpu()).abs().float().mean() < MEAN_LIMIT


def test_damage_inside_the_picture_never_ends_a_run(name, mixed):
    """What the header does not tell: the decoder may take it or not, but the batch comes."""
    index, rng = FolderIndex(mixed), np.random.default_rng(0)
    for sample_id in range(12, 60, 3):
        data = bytearray(Path(index.path(sample_id)).read_bytes())
        for place in rng.integers(len(data) // 3, len(data) - 2, 20):
            data[place] ^= 1 << int(rng.integers(8))
        Path(index.path(sample_id)).write_bytes(data)
    got, _, _ = first(name, mixed, 3, on_bad_image="skip", bad_image_budget=1.0)
    assert len(got) == 3


def test_only_threads_that_decode_on_a_gpu_leave_its_default_stream_and_share_another(monkeypatch):
    """torch's pool has 32 streams, and keeps the memory of each apart: a loader that is opened again takes no new one."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: calls.append(("new", device)) or f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(("use", stream)))
    workers._decode_stream.cache_clear()
    for uses_gpu in (False, True, True):
        workers._settle_thread(1, uses_gpu)
    workers._decode_stream.cache_clear()
    use = [("device", 1), ("use", "stream of 1")]
    assert calls == [("device", 1), use[0], ("new", 1), use[1], *use]


class CountingReader(device_decode.DeviceReader):
    """Every picture of batch n has the value n."""

    name, batches = "counting", 0

    def decode(self, datas, boxes, sizes):
        self.batches += 1
        self.stream = torch.cuda.current_stream()
        full = [torch.full((3, *size), self.batches, dtype=torch.uint8, device=self.device) for size in sizes]
        return [[picture] * len(datas) for picture in full]


class CountingLoader(device_decode.DeviceLoader):
    reader_class = CountingReader


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_beside_other_work_and_writes_over_nothing_that_is_still_to_be_read(demo_set):
    loader = CountingLoader(demo_set / "train", CROPS[:1], batch_size=8)
    found = []
    try:
        batches = loader.epoch(0)
        next(batches)  # starts all there is to start
        for _ in range(loader.steps_per_epoch - 1):
            torch.cuda._sleep(1 << 28)  # cycles: the reader is late
            batch = next(batches)
            assert not torch.cuda.default_stream().query(), "it waited for other work"
            found.append(torch.stack([batch.crops[0].amin(), batch.crops[0].amax()]))
            del batch
        assert loader._source.reader.stream != torch.cuda.default_stream()
    finally:
        loader.close()
    assert torch.stack(found).tolist() == [[i, i] for i in range(2, len(found) + 2)]
