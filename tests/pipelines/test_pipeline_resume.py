"""Every loader, stopped and continued at any step with any number of ranks: each image once, in one order, in one box."""

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines import CropSpec, make_loader
from fastmim_pipelines import loader as loader_module
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonWriter
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.sampling import crop_box, permute
from PIL import Image

CROPS = (CropSpec((16, 18)), CropSpec((8, 8)), CropSpec((12, 12), scale=(0.05, 0.5), view=1))
COUNT, BATCH, SEED = 101, 24, 7
STEPS = COUNT // BATCH
WORLDS = (1, 2, 3, 4, 8)
PACKAGES = {"hf": "datasets", "dali": "nvidia.dali", "nvimgcodec": "nvidia.nvimgcodec"}
KINDS = ("folder", "tar", "ffcv", "hf", "dali", "nvimgcodec", "synthetic")


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """One set of pictures of all shapes in folders of any depth, as each loader wants it; the order is that of names."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(3)
    for i in range(COUNT):
        width, height = rng.integers(9, 70, 2).tolist()
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        path = root / "folder" / "/".join(f"{n:02d}" for n in rng.integers(0, 9, rng.integers(0, 4))) / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    index = FolderIndex(root / "folder")
    paths = [Path(index.path(i)) for i in range(COUNT)]
    (root / "tar").mkdir()
    for shard in range(3):
        with tarfile.open(root / "tar" / f"{shard}.tar", "w") as tar:
            for i in range(shard * 40, min(COUNT, shard * 40 + 40)):
                member = tarfile.TarInfo(f"{i:04d}.jpg")
                member.size = paths[i].stat().st_size
                tar.addfile(member, io.BytesIO(paths[i].read_bytes()))
    with BetonWriter(root / "x.beton", COUNT, LEAST_PAGE) as writer:
        for path in paths:
            writer.add(path.read_bytes(), -1, Image.open(path).size)
    found = {"folder": root / "folder", "tar": root / "tar", "ffcv": root / "x.beton"}
    if is_installed("datasets"):
        import datasets

        rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image()).to_parquet(
            root / "x.parquet"
        )
        found["hf"] = root / "x.parquet"
    return found


def make(kind: str, sets: dict[str, Path], **options):
    if kind == "synthetic":
        return make_loader(kind, CROPS, batch_size=BATCH, seed=SEED, count=COUNT, **options)[0]
    return make_loader(kind, CROPS, data=sets.get(kind, sets["folder"]), batch_size=BATCH, seed=SEED, **options)[0]


def take(loader, start: int, count: int) -> list:
    """So many batches from a step of the whole run on, over the ends of epochs."""
    found = []
    while len(found) < count:
        epoch, step = divmod(start + len(found), STEPS)
        for batch in loader.epoch(epoch, step):
            found.append(batch)
            if len(found) == count:
                break
    loader.close()
    return found


@pytest.fixture(scope="module")
def straight(sets) -> list:
    """The run that nothing interrupts."""
    return take(make("folder", sets, workers=0), 0, 3 * STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_any_loader_goes_on_at_any_step_on_any_number_of_ranks(kind, sets, straight, monkeypatch):
    if kind in PACKAGES and not is_installed(PACKAGES[kind]):
        pytest.skip(f"{PACKAGES[kind]} is not installed")
    boxes: dict[tuple, set] = {}

    def recorded(seed, epoch, sample_id, view, *shape_and_more):
        box = crop_box(seed, epoch, sample_id, view, *shape_and_more)
        boxes.setdefault((epoch, sample_id, view), set()).add(box)
        return box

    monkeypatch.setattr(loader_module, "crop_box", recorded)
    # Crops of the same picture at another resume point or rank must be bit for bit those of the first time.
    rng, pieces, at = np.random.default_rng(KINDS.index(kind)), [], 0
    while at < 3 * STEPS:
        world, count = int(rng.choice(WORLDS)), int(rng.integers(1, 5))
        count = min(count, 3 * STEPS - at)
        options = (
            {}
            if kind in ("synthetic", "dali", "nvimgcodec")
            else {"threads": int(rng.integers(4)) or None, "workers": 0}
        )
        ranks = [take(make(kind, sets, rank=rank, world=world, **options), at, count) for rank in range(world)]
        for step in range(count):
            ids = np.concatenate([rank[step].ids.numpy() for rank in ranks])
            pieces.append(
                (ids, [np.concatenate([rank[step].crops[k].cpu().numpy() for rank in ranks]) for k in range(3)])
            )
        at += count
    for epoch in range(3):
        order = permute(SEED, epoch, COUNT, np.arange(COUNT))
        seen = np.concatenate([ids for ids, _ in pieces[epoch * STEPS : (epoch + 1) * STEPS]])
        assert np.array_equal(seen, order[: STEPS * BATCH])
        assert len(set(seen.tolist())) == STEPS * BATCH  # each once; what does not fill a batch is left out
    if kind == "synthetic":
        return
    index = FolderIndex(sets["folder"])
    assert {key[:2] for key in boxes} >= {(i // STEPS, int(n)) for i, (ids, _) in enumerate(pieces) for n in ids}
    for (epoch, sample_id, view), found in boxes.items():
        width, height = Image.open(index.path(sample_id)).size
        crop = next(crop for crop in CROPS if crop.view == view)
        assert found == {crop_box(SEED, epoch, sample_id, view, width, height, crop.scale, crop.ratio)}
    limit = 1.0 if kind in ("dali", "nvimgcodec") else 0.0  # gray levels on average; see test_pipeline_parity.py
    for (ids, crops), batch in zip(pieces, straight, strict=True):
        assert np.array_equal(ids, batch.ids.numpy())
        for got, expected in zip(crops, batch.crops, strict=True):
            assert np.abs(got.astype(int) - expected.numpy()).mean() <= limit


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_go_on_at_any_step_too(sets, straight, workers):
    for start, world in ((0, 1), (3, 2), (STEPS - 1, 1), (STEPS, 2), (2 * STEPS + 1, 1)):
        ranks = [take(make("folder", sets, rank=rank, world=world, workers=workers), start, 2) for rank in range(world)]
        for step in range(2):
            ids = np.concatenate([rank[step].ids.numpy() for rank in ranks])
            assert np.array_equal(ids, straight[start + step].ids.numpy())
            for k, expected in enumerate(straight[start + step].crops):
                assert np.array_equal(np.concatenate([rank[step].crops[k].numpy() for rank in ranks]), expected.numpy())
