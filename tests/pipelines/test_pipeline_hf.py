"""Data sets of Hugging Face: the same batches as from the files, labels and errors included."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines import CropSpec, make_loader
from fastmim_pipelines.hf import HfIndex
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.spec import DataError

CROPS = (CropSpec((16, 18)),)


def test_missing_package_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.hf.PACKAGE", "datasets_that_are_not_there")
    with pytest.raises(ModuleNotFoundError, match=r"hf needs datasets.*; pip install datasets"):
        make_loader("hf", CROPS, data=tmp_path, batch_size=2)


def test_auto_recognizes_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.hf.PACKAGE", "datasets_that_are_not_there")
    (tmp_path / "saved").mkdir()
    for name in ("saved/dataset_info.json", "saved/state.json", "saved/data.arrow", "x.parquet"):
        (tmp_path / name).touch()
    for data in (tmp_path / "saved", tmp_path / "x.parquet", tmp_path):
        with pytest.raises(ModuleNotFoundError, match="hf needs"):
            open_index(data)


@pytest.fixture
def saved(demo_set, tmp_path):
    """The validation pictures in each form that is read."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    files = FolderIndex(demo_set / "val")
    features = datasets.Features(
        {"name": datasets.Value("string"), "image": datasets.Image(), "label": datasets.ClassLabel(names=files.classes)}
    )
    rows = [
        {
            "name": files.name(i),
            "image": {"bytes": Path(files.path(i)).read_bytes(), "path": None},
            "label": int(files.labels[i]),
        }
        for i in range(len(files))
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    for part in range(2):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        data.shard(2, part, contiguous=True).to_parquet(str(tmp_path / "parquet" / f"{part}.parquet"))
    return files, [tmp_path / "saved", tmp_path / "parquet"]


def batches(loader) -> list:
    try:
        return [(b.ids.tolist(), b.crops[0].numpy().tobytes()) for b in loader.epoch(1)]
    finally:
        loader.close()


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"workers": 1}], ids=str)
def test_batches_equal_those_of_the_files(saved, options):
    files, forms = saved
    expected = batches(make_loader("folder", CROPS, data=files, batch_size=5)[0])
    for data in forms:
        loader, reason = make_loader("auto", CROPS, data=data, batch_size=5, **options)
        assert reason.startswith("hf: ") and batches(loader) == expected
        assert loader.index.classes == files.classes and np.array_equal(loader.index.labels, files.labels)
    index = HfIndex(forms[1] / "0.parquet", classes=[*reversed(files.classes)])
    assert len(index) == 10 and index.labels.tolist() == (9 - files.labels[:10]).tolist()


def test_rows_that_are_no_images_are_substituted(tmp_path, demo_set):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    picture = next((demo_set / "val").rglob("*.jpg"))
    cells = [
        {"bytes": picture.read_bytes()},
        {"path": str(picture)},
        {"bytes": b"<html>"},
        None,
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"image": None if cell is None else {"bytes": None, "path": None, **cell}, "label": 7} for cell in cells]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "x"))
    index = open_index(tmp_path / "x")
    assert index.classes == ["7"] and index.labels.tolist() == [0] * 4
    with pytest.raises(DataError, match=r"x: row [23]: "):
        batches(make_loader("hf", CROPS, data=index, batch_size=4)[0])
    loader, _ = make_loader("hf", CROPS, data=index, batch_size=4, on_bad_image="skip")
    assert len(batches(loader)) == 1 and {path for path, _ in loader.bad_images} == {
        f"{tmp_path}/x: row {i}" for i in (2, 3)
    }


def test_what_is_no_data_set_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "text"))
    for name, reason in (
        ("empty", "cannot be opened"),
        ("x.parquet", "cannot be opened"),
        ("text", "expected a column of images, got text"),
    ):
        with pytest.raises(DataError, match=reason) as error:
            HfIndex(tmp_path / name)
        assert error.value.exit_code == 2 and "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot be opened"):
        HfIndex(tmp_path / "saved")
