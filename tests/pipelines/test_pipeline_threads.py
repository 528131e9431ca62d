"""Loaders that decode in threads, natively or not: the same batches, errors and ends as without."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from bad_files import PILLOW_WARNS
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.spec import CropSpec, DataError
from fastmim_pipelines.workers import ThreadAnswers
from native_decoding import DECODER, needs_native
from PIL import Image

pytestmark = [pytest.mark.usefixtures("unforced"), *PILLOW_WARNS]

CROPS = (CropSpec((32, 32)), CropSpec((24, 20), scale=(0.05, 0.4), view=1, filter="lanczos"))


@pytest.fixture
def loader_of(request):
    def build(folder, **options) -> FolderLoader:
        loader = FolderLoader(folder, CROPS, **{"batch_size": 8, **options})
        request.addfinalizer(loader.close)
        return loader

    return build


def batches(loader, epoch=0, start=0) -> list:
    return [
        (batch.ids.tolist(), *(crop.numpy().tobytes() for crop in batch.crops)) for batch in loader.epoch(epoch, start)
    ]


@pytest.fixture
def mixed(demo_set, tmp_path) -> Path:
    """The training pictures, some as PNG, CMYK or gray JPEG."""
    folder = tmp_path / "mixed"
    shutil.copytree(demo_set / "train", folder)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        if i % 4 == 0:
            image = Image.open(path)
            if i % 12 == 0:
                image.save(path, "PNG")
            else:
                image.convert("CMYK" if i % 12 == 4 else "L").save(path, "JPEG")
    return folder


@pytest.mark.parametrize("in_chans", [1, 3])
def test_loader_gives_the_same_batches_by_any_decoder(mixed, loader_of, monkeypatch, in_chans):
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    expected = batches(loader_of(mixed, in_chans=in_chans))
    monkeypatch.delenv("FASTMIM_DECODE")
    for options in ({"workers": 0}, {"workers": 0, "threads": 1}, {"workers": 0, "threads": 5}, {"workers": None}):
        loader = loader_of(mixed, in_chans=in_chans, **options)
        assert batches(loader) == expected, options
        assert batches(loader, 0, 5) == expected[5:]
        assert len(batches(loader, 1)) == 7


def test_loader_decodes_in_threads_by_default_where_that_is_native(demo_set, loader_of, monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.workers.default_workers", lambda world, trains_on_cpu: 3)
    loader = loader_of(demo_set / "train", workers=None)
    if DECODER is not None:
        assert (loader.workers, loader.threads) == (0, 3) and loader.reason.startswith("native decoder with libjpeg")
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    loader = loader_of(demo_set / "train", workers=None)
    assert (loader.workers, loader.threads) == (3, 1) and loader.reason == "Pillow decodes: FASTMIM_DECODE=pillow"
    assert [loader_of(demo_set / "train", workers=w, threads=t).threads for w, t in ((0, None), (2, None), (1, 4), (0, 2))] == [
        0, 1, 4, 2,
    ]  # fmt: skip
    monkeypatch.delenv("FASTMIM_DECODE")
    assert "Pillow decodes: " in FolderLoader(demo_set / "train", CROPS, batch_size=8, in_chans=4).reason


def test_loader_threads_end_with_the_loader(demo_set, loader_of):
    before = set(threading.enumerate())
    loader = loader_of(demo_set / "train", workers=0, threads=3)
    running = loader.epoch(0)
    next(running)
    assert len(set(threading.enumerate()) - before) == 3
    loader.close()
    loader.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="use the newest iterator only"):
        next(running)


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"workers": 0, "threads": 3}, {"workers": 2, "threads": 2}], ids=str
)
def test_loader_carries_errors_and_substitutes_alike_in_threads(mixed, loader_of, monkeypatch, options):
    index = FolderIndex(mixed)
    for sample_id, data in ((4, b""), (21, Path(index.path(21)).read_bytes()[:-400]), (50, b"<html>")):
        Path(index.path(sample_id)).write_bytes(data)
    spoiled = {index.path(i) for i in (4, 21, 50)}
    with pytest.raises(DataError, match="--on-bad-image skip") as error:
        batches(loader_of(mixed, **options))
    assert error.value.path in spoiled and "(sample " in str(error.value)
    loader = loader_of(mixed, on_bad_image="skip", **options)
    got = batches(loader)
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    plain = loader_of(mixed, on_bad_image="skip")
    assert got == batches(plain)
    assert loader.bad_images == plain.bad_images and {path for path, _ in loader.bad_images} <= spoiled


def test_loader_notices_files_that_vanish_during_a_run(mixed, loader_of):
    loader = loader_of(mixed, workers=0, threads=2)
    running = loader.epoch(0)
    next(running)
    shutil.rmtree(mixed)
    with pytest.raises(DataError, match="cannot be read"):
        for epoch in range(1, 4):
            list(running)
            running = loader.epoch(epoch)


@needs_native
def test_processes_may_fork_while_threads_decode(demo_set, loader_of):
    ahead = loader_of(demo_set / "train", workers=0, threads=2)
    running = ahead.epoch(0)
    next(running)
    expected = batches(loader_of(demo_set / "train"))
    for _ in range(3):
        assert batches(loader_of(demo_set / "train", workers=2)) == expected
        next(running)


@pytest.mark.parametrize("options", [{"workers": 2}, {"threads": 3}, {"workers": None}], ids=str)
def test_evaluation_reads_the_same_by_any_decoder(mixed, monkeypatch, options):
    Path(FolderIndex(mixed).path(7)).write_bytes(b"")

    def read(**options):
        reader = EvalReader(mixed, (28, 30), batch_size=7, on_bad_image="skip", **options)
        return [(b.images.numpy().tobytes(), b.labels.tolist(), b.ids.tolist()) for b in reader], reader.bad_images

    got = read(**options)
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    assert got == read() and len(got[1]) == 1


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, seconds: float) -> float:
        if seconds < 0:
            raise DataError("bad", path="p")
        time.sleep(seconds)
        return seconds


def test_thread_answers_come_in_order_with_errors_at_their_place():
    answers = ThreadAnswers(Slow(), [0.05, 0, 0.02, -1, 0.01], threads=3)
    assert [next(answers) for _ in range(3)] == [0.05, 0, 0.02]
    with pytest.raises(DataError, match="bad"):
        next(answers)
    assert next(answers) == 0.01
    with pytest.raises(StopIteration):
        next(answers)
    answers.close()
    answers.close()


class Stuck(torch.utils.data.Dataset):
    """Answers when it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def __getitem__(self, request: int) -> int:
        self.released.wait()
        return request


def test_thread_answers_do_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.workers._PATIENCE_S", 0.05)
    stuck = Stuck()
    answers = ThreadAnswers(stuck, range(5), threads=1, timeout_s=0.05)
    with pytest.raises(RuntimeError, match=r"data threads: expected an answer within 0.05 s, got none; look whether"):
        next(answers)
    answers.close()  # comes back, though the thread is stuck
    stuck.released.set()


def test_thread_answers_prepare_each_thread():
    prepared = []
    answers = ThreadAnswers(Slow(), [0.01] * 4, threads=2, prepare=lambda: prepared.append(threading.current_thread()))
    assert list(answers) == [0.01] * 4 and len(set(prepared)) == 2
    answers.close()
