"""The demo set: same bytes whatever draws them, balanced classes, and a folder that is never left half done."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines.demo import CLASS_NAMES, DemoSpec, write_demo
from fastmim_pipelines.demo_scene import CLASSES, silhouette
from fastmim_pipelines.demo_textures import FAMILIES, TILE, spectral_noise
from PIL import Image


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_demo_is_the_same_for_any_number_of_processes(tmp_path):
    for workers in (1, 2):
        write_demo(tmp_path / str(workers), images=110, val_images=20, workers=workers, progress=lambda line: None)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert len(digests(tmp_path / "1")) == 131


def test_demo_differs_between_seeds_and_grows_by_appending(tmp_path, demo_set):
    write_demo(tmp_path / "seed", images=10, val_images=0, seed=1, workers=1, progress=lambda line: None)
    write_demo(tmp_path / "less", images=10, val_images=0, workers=1, progress=lambda line: None)
    name = "train/disc-stripes/000000.jpg"
    assert digests(tmp_path / "seed")[name] != digests(demo_set)[name]
    assert digests(tmp_path / "less")[name] == digests(demo_set)[name]


def test_demo_classes_are_balanced_and_splits_differ(demo_set):
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10
    for split, each in (("train", 6), ("val", 2)):
        assert {folder.name: len(list(folder.iterdir())) for folder in (demo_set / split).iterdir()} == dict.fromkeys(
            CLASS_NAMES, each
        )
    pictures = digests(demo_set)
    assert len(set(pictures.values())) == len(pictures)


def test_demo_pictures_are_varied_jpegs(demo_set):
    pictures = [Image.open(path) for path in demo_set.rglob("*.jpg")]
    assert {picture.format for picture in pictures} == {"JPEG"} and {picture.mode for picture in pictures} == {"RGB"}
    sides = np.array([picture.size for picture in pictures])
    assert sides.min() >= 96 and sides.max() <= 264 and len(np.unique(sides, axis=0)) > 40
    assert {bool(w > h) for w, h in sides} == {True, False}
    assert min(np.asarray(picture.convert("L")).std() for picture in pictures) > 8  # none is flat


def test_demo_color_says_nothing_about_the_class(tmp_path):
    write_demo(tmp_path, images=300, val_images=0, workers=1, progress=lambda line: None)
    means = np.array(
        [
            [np.asarray(Image.open(path)).mean((0, 1)) for path in sorted((tmp_path / "train" / name).iterdir())]
            for name in CLASS_NAMES
        ]
    )
    between, within = means.mean(1).var(0, ddof=1), means.var(1, ddof=1).mean(0)
    assert np.all(between < 2.5 * within / means.shape[1])  # F below 2.5 for each channel: p > 0.01


def test_demo_is_kept_when_complete(tmp_path):
    lines: list[str] = []
    for _ in range(2):
        write_demo(tmp_path, images=10, val_images=5, workers=1, progress=lines.append)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "drawing 15 pictures" in lines[0] and lines[-1].endswith("kept.")


def test_demo_is_finished_after_an_interruption(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        write_demo(folder, images=20, val_images=5, workers=1, progress=lambda line: None)
    record = json.loads((cut / "demo.json").read_text())
    (cut / "demo.json").write_text(json.dumps({**record, "finished": False}))
    (cut / "train/ring-maze/000005.jpg").write_bytes(b"half a file")
    (cut / "val/ring-maze/000000.jpg").unlink(missing_ok=True)
    write_demo(cut, images=20, val_images=5, workers=1, progress=lambda line: None)
    assert digests(cut) == digests(whole)


def test_demo_replaces_deleted_pictures_only(tmp_path):
    write_demo(tmp_path, images=10, val_images=0, workers=1, progress=lambda line: None)
    before = digests(tmp_path)
    (tmp_path / "train/star-scales/000003.jpg").unlink()
    lines: list[str] = []
    write_demo(tmp_path, images=10, val_images=0, workers=1, progress=lines.append)
    assert digests(tmp_path) == before and "drawing 1 pictures" in lines[0]


@pytest.mark.parametrize("change", [{"images": 11}, {"val_images": 1}, {"seed": 1}, {"spec": DemoSpec(contrast=200)}])
def test_demo_with_other_parameters_is_refused(tmp_path, change):
    settings = {"images": 10, "val_images": 0, "workers": 1, "progress": lambda line: None}
    write_demo(tmp_path, **settings)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"other parameters \(.* = .*, not .*\); delete the folder"):
        write_demo(tmp_path, **{**settings, **change})
    assert digests(tmp_path) == before


def test_demo_does_not_touch_a_folder_of_others(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="expected an empty folder"):
        write_demo(tmp_path, images=10, progress=lambda line: None)
    with pytest.raises(ValueError, match="got a file"):
        write_demo(tmp_path / "holiday.jpg", images=10, progress=lambda line: None)
    (tmp_path / "demo.json").write_text("[]")
    with pytest.raises(ValueError, match="expected the record of a demo data set"):
        write_demo(tmp_path, images=10, progress=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "holiday.jpg"]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"val_images": -1}, {"seed": -1}])
def test_demo_rejects_counts_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected at least"):
        write_demo(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_textures_are_periodic():
    rng = np.random.default_rng(0)
    for name, draw in FAMILIES.items():
        tile = np.asarray(draw(rng), float)
        assert tile.shape == (TILE, TILE)
        for rows in (tile, tile.T):  # the step over the edge is one as within
            steps = np.abs(np.diff(rows, axis=0)).mean(1)
            assert np.abs(rows[0] - rows[-1]).mean() < 1.2 * steps.max(), name
    assert abs(spectral_noise(rng, 2.0).std() - 1) < 1e-3


@pytest.mark.parametrize("shape", [shape for shape, _ in CLASSES] + ["blob"])
def test_silhouette_has_about_unit_size(shape):
    outline, hole = silhouette(shape, np.random.default_rng(0))
    reach = np.linalg.norm(outline, axis=1).max()
    assert 0.8 < reach < 2 and (hole is None or np.linalg.norm(hole, axis=1).max() < reach)


def test_silhouette_names_its_choices():
    with pytest.raises(ValueError, match=r"expected one of .*star"):
        silhouette("cube", np.random.default_rng(0))
