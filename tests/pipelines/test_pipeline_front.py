"""The front door, the contract, the synthetic loader, and what the package may import."""

import ast
import subprocess
import sys
from pathlib import Path

import fastmim_pipelines
import pytest
import torch
from fastmim_pipelines import CropSpec, make_loader
from fastmim_pipelines.index import open_index
from fastmim_pipelines.pack import pack
from fastmim_pipelines.spec import check_crops

PACKAGE = Path(fastmim_pipelines.__file__).parent
CROPS = (CropSpec((16, 16)), CropSpec((8, 12), view=1))


@pytest.fixture(scope="module")
def data_of(demo_set, tmp_path_factory) -> dict[str, Path]:
    """For each loader of files the same pictures."""
    folder = tmp_path_factory.mktemp("packed")
    index = open_index(demo_set / "train")
    pack(index, folder / "tar", to="tar", shard_bytes=150_000, workers=0, progress=lambda line: None)
    pack(index, folder / "x.beton", to="beton", workers=0, progress=lambda line: None)
    return {"folder": demo_set / "train", "tar": folder / "tar", "ffcv": folder / "x.beton"}


def test_make_loader_finds_each_loader_by_name(data_of):
    assert set(fastmim_pipelines.LOADERS) == {*data_of, "synthetic", "hf", "dali", "nvimgcodec"}
    for name in (*data_of, "synthetic"):  # the others: test_pipeline_device.py, test_pipeline_hf.py
        loader, reason = make_loader(name, CROPS, data=data_of.get(name), batch_size=4, seed=3)
        batch = next(iter(loader.epoch(0)))
        assert reason.startswith(f"{name}{':' if name == 'synthetic' else ','} as asked for")
        assert batch.crops[1].shape == (4, 3, 8, 12)
        loader.close()
        loader.close()


def test_make_loader_auto_takes_what_fits_the_data_and_says_why(data_of, monkeypatch):
    batches = []
    for name, data in data_of.items():
        for given in (data, str(data), open_index(data)):
            loader, reason = make_loader("auto", CROPS, data=given, batch_size=4, workers=0)
            assert loader.index.kind == name and reason.startswith(f"{name}: ")
            assert reason.endswith(", when a batch is asked for")
            batches.append([(b.ids.tolist(), [crop.numpy().tobytes() for crop in b.crops]) for b in loader.epoch(1)])
    assert all(other == batches[0] for other in batches), "the same pixels in the same order, whatever holds them"
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    loader, reason = make_loader("auto", CROPS, data=data_of["tar"], batch_size=4, workers=2)
    assert reason == "tar: Pillow decodes: FASTMIM_DECODE=pillow, 2 worker processes"
    loader, reason = make_loader("auto", CROPS, data=data_of["tar"], batch_size=4, threads=3, workers=1)
    assert reason.endswith("1 worker process of 3 threads")
    loader, reason = make_loader("auto", CROPS, data=data_of["tar"], batch_size=4, threads=1)
    assert reason.endswith("1 thread ahead of need")


def test_make_loader_names_choices_and_missing_data(data_of):
    with pytest.raises(
        ValueError, match=r"expected one of auto, folder, tar, ffcv, hf, dali, nvimgcodec, synthetic, got 'fast'"
    ):
        make_loader("fast", CROPS, batch_size=4)
    for name in ("auto", "folder"):
        with pytest.raises(ValueError, match=f"data: expected a folder of images for the loader '{name}', got none"):
            make_loader(name, CROPS, batch_size=4)
    with pytest.raises(ValueError, match=r"loader: expected tar for .*, got 'folder'; choose auto"):
        make_loader("folder", CROPS, data=open_index(data_of["tar"]), batch_size=4)
    with pytest.raises(ValueError, match="loader: expected one of auto, folder, tar, ffcv, hf for"):
        open_index(data_of["tar"], "synthetic")


def test_synthetic_pictures_follow_from_seed_and_id():
    def batches(**options):
        loader, _ = make_loader("synthetic", CROPS, **{"batch_size": 8, "count": 100, **options})
        assert loader.steps_per_epoch == 12
        return list(loader.epoch(1, 10))

    whole = batches()
    assert len(whole) == 2 and whole[0].crops[0].shape == (8, 3, 16, 16) and whole[0].crops[0].dtype == torch.uint8
    parts = [batches(rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.ids, torch.cat([part[step].ids for part in parts]))
        assert torch.equal(batch.crops[1], torch.cat([part[step].crops[1] for part in parts]))
        assert batch.ids.dtype == torch.int64
    assert not torch.equal(batches(seed=1)[0].crops[0], whole[0].crops[0])
    assert batches(in_chans=5)[0].crops[0].shape == (8, 5, 16, 16)
    with pytest.raises(ValueError, match="expected at most the 100 synthetic images"):
        batches(batch_size=101)


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ((), "expected at least one"),
        ([CropSpec((0, 8))], "CropSpec.size"),
        ([CropSpec((8, 8), scale=(0, 1))], "scale"),
        ([CropSpec((8, 8), scale=(0.5, 0.2))], "scale"),
        ([CropSpec((8, 8), scale=(0.5, 1.2))], "scale"),
        ([CropSpec((8, 8), ratio=(0, 1))], "ratio"),
        ([CropSpec((8, 8)), CropSpec((8, 8), scale=(0.1, 1))], "share one box"),
    ],
    ids=str,
)
def test_crop_specs_are_checked(crops, message):
    with pytest.raises(ValueError, match=message):
        check_crops(crops, 3)


def test_package_imports_only_what_it_may():
    allowed = {"torch", "numpy", "PIL", *sys.stdlib_module_names}
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path.name


def test_package_and_demo_import_without_torch():
    modules = "fastmim_pipelines, fastmim_pipelines.demo, fastmim_pipelines.sampling"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
