"""Files that vanish, shrink or become something else while a run reads them: told, or replaced."""

import os
import shutil
import time
from pathlib import Path

import bad_files
import pytest
from bad_files import CROPS, MARKS, SECONDS
from fastmim_pipelines import make_loader
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonWriter
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.spec import DataError

pytestmark = MARKS


def gone(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


HARMS = (gone, emptied, cut, replaced_by_a_folder, replaced_by_a_pipe, replaced_by_a_link_to_itself)


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 3}, {"workers": 1}], ids=str)
def test_files_that_change_during_a_run_are_told_or_replaced(tmp_path, options):
    for i in range(48):
        (tmp_path / f"{i:02d}.jpg").write_bytes(bad_files.encoded(image=bad_files.picture(i)))
    index = FolderIndex(tmp_path)
    settings = {"batch_size": 6, "on_bad_image": "skip", "bad_image_budget": 1.0} | options
    loader, _ = make_loader("folder", CROPS, data=index, **settings)
    began = time.monotonic()
    running = loader.epoch(0)
    next(running)
    for i in range(0, 48, 4):
        HARMS[i // 4 % len(HARMS)](Path(index.path(i)))
    # What was read ahead is whole; after it, every changed file is replaced and told once.
    assert len(list(running)) == 7
    assert all(len(batch.ids) == 6 for batch in loader.epoch(1))
    loader.close()
    assert {path for path, _ in loader.bad_images} == {index.path(i) for i in range(0, 48, 4)}
    loader, _ = make_loader("folder", CROPS, data=index, **(settings | {"on_bad_image": "error"}))
    with pytest.raises(DataError, match=r"\d\d\.jpg: .*\(sample \d+\)"):
        list(loader.epoch(0))
    loader.close()
    assert time.monotonic() - began < SECONDS


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_files_that_may_not_be_read_are_told(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bad_files.encoded())
    (tmp_path / "a.jpg").chmod(0)
    loader, _ = make_loader("folder", CROPS, data=tmp_path, batch_size=1)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read \(Permission denied\)"):
        next(loader.epoch(0))


def test_a_beton_file_that_is_cut_during_a_run_is_told(tmp_path):
    with BetonWriter(tmp_path / "x.beton", 48, LEAST_PAGE) as writer:
        for i in range(48):
            writer.add(bad_files.encoded(image=bad_files.picture(i)), -1, (1, 1))
    for options in ({"workers": 0}, {"threads": 2}, {"workers": 1}):
        copy = shutil.copy(tmp_path / "x.beton", tmp_path / "y.beton")
        loader, _ = make_loader("ffcv", CROPS, data=copy, batch_size=6, **options)
        running = loader.epoch(0)
        next(running)
        os.truncate(copy, LEAST_PAGE + 100)
        with pytest.raises(DataError, match=r"y\.beton: sample \d+: .*cut short.*--on-bad-image skip"):
            list(running) and list(loader.epoch(1))
        loader.close()
