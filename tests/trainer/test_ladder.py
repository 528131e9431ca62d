"""The ladder of methods, as a process: baselines, two methods, an archive, a row that fails."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from trainer_run import ROOT, environment

TINY = ["--image-size", "16", "--patch-size", "4", "--epochs", "1", "--device", "cpu", "--workers", "0"]
EXTRA = ["--extra", "--batch-size", "12", "--precision", "fp32"]


def ladder(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "ladder.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd=cwd)


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def archive(images: Path, tmp_path_factory) -> Path:
    """The training images zipped the way archives often are: one folder around all, and a stranger's leftovers."""
    path = tmp_path_factory.mktemp("zip") / "train.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in (images / "train").rglob("*.jpg"):
            file.write(image, Path("my-set") / image.relative_to(images / "train"))
        file.writestr("__MACOSX/my-set/._000.jpg", b"no image")
    return path


def test_ladder_trains_from_an_archive_and_writes_both_files(images, archive, tmp_path):
    out = tmp_path / "deep" / "table.md"
    done = ladder(
        "--data", str(archive), "--val-data", str(images / "val"), "--methods", "mae", *TINY, "--out", str(out), *EXTRA,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, found = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    assert text in done.stdout
    assert [row["name"] for row in found["rows"]] == ["random init", "raw pixels", "mae"]
    assert (found["train_images"], found["val_images"], found["classes"]) == (36, 9, 3)
    assert found["versions"]["torch"] and found["command"].startswith("python bench/ladder.py --data")
    assert found["command"] in text and found["commit"] in text and "n = 1" in text
    for row in found["rows"]:
        # Nine validation images: accuracies are ninths.
        for name in ("knn_top1", "linear_top1"):
            assert 9 * row[name] == pytest.approx(round(9 * row[name]), abs=1e-9)
        assert cells(text, row["name"])[2:4] == [f"{100 * row['knn_top1']:.1f}", f"{100 * row['linear_top1']:.1f}"]
    row = found["rows"][2]
    assert (row["epochs"], row["images_seen"]) == (1.0, 36), "three steps of twelve images"
    assert row["seconds"] > 0 and row["images_per_s"] > 0 and row["error"] == ""
    assert row["command"].startswith(f"python fastmim/train.py --method mae --preset demo --data {archive} ")
    assert "--out runs/mae-0 " in row["command"] and "ladder-" not in row["command"]
    assert "--epochs 1 " in row["command"] and "--preset demo" in row["command"]
    assert "--val-data" not in row["command"], "training never sees the validation images"
    assert set(row["losses"]) == {"pixel"} and cells(text, "mae")[1] == f"pixel {row['losses']['pixel']:.4f}"


def test_ladder_shows_a_failing_method_and_goes_on(images, tmp_path):
    """A flag that only one of the methods has: the other one's process ends with exit code 2."""
    out = tmp_path / "table.md"
    done = ladder(
        "--data", str(images), "--methods", "mae", "cmae", *TINY, "--out", str(out), *EXTRA, "--cmae.temperature", "0.2"
    )
    assert done.returncode == 1
    found = json.loads(out.with_suffix(".json").read_text())
    mae, cmae = found["rows"][2:]
    assert mae["error"].startswith("exit code 2: --cmae.temperature: expected a known flag") and mae["knn_top1"] is None
    assert "**failed** (seed 0): exit code 2" in cells(out.read_text(), "mae")[1]
    assert cmae["error"] == "" and cmae["knn_top1"] is not None
    assert set(cmae["losses"]) == {"pixel", "contrast"}
    assert f"the whole table took {found['seconds'] / 60:.1f}." in out.read_text()


def test_a_batch_is_no_larger_than_the_data(monkeypatch):
    """CMAE's preset has 128 images, the others' 32."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from ladder import fitting

    assert fitting("cmae", 100, []) == ["--batch-size", "96"]
    assert fitting("cmae", 128, []) == fitting("mae", 100, []) == []
    assert fitting("cmae", 100, ["--batch-size", "50"]) == []


def test_longest_trainings_begin_first(monkeypatch):
    """Or the last one runs alone."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from ladder import cost, parse

    def of(method, *arguments):
        return cost(method, 0, parse([*arguments]))

    assert of("icmae") > of("mae") > 0, "two views and two decoders"
    assert of("cae") > of("mae"), "fewer FLOPs in more operations"
    assert of("mae", "--image-size", "192") > 8 * of("mae"), "16 times the patches, in as many steps"
    assert of("mae", "--extra", "--mae.no-such-option", "1") == 0


def test_trainings_share_the_cores(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from ladder import core_shares

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6, 7, 9})
    assert core_shares(1) == [[3, 5, 6, 7, 9]]
    assert core_shares(2) == [[3, 5], [6, 7]]
    assert core_shares(12) == [[3], [5], [6], [7], [9]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "nowhere: expected a folder or a .zip archive, got nothing there"),
        (
            ["--data", "text.zip", "--val-data", "text.zip"],
            "text.zip: expected a folder or a .zip archive, got another",
        ),
        (["--data", "images/train"], "--val-data: expected labeled images"),
        (["--data", "images", "--methods", "mea"], "--methods: expected some of"),
        (["--data", "images/train/class0", "--val-data", "images/val"], "images without a class"),
    ],
    ids=["missing", "no-archive", "no-val", "method", "no-classes"],
)
def test_ladder_says_what_is_wrong_in_one_line(arguments, words, images, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import ladder as bench_ladder

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "images").symlink_to(images)
    assert bench_ladder.main([*arguments, *TINY, "--out", "out.md"]) == 2
    error = capsys.readouterr().err
    assert words in error and re.fullmatch(r"error: [^\n]*\n", error)
    assert not (tmp_path / "out.md").exists()


def test_several_seeds_give_mean_and_range(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from ladder_table import Row, markdown

    def row(seed, knn):
        return Row("mae", seed, losses={"pixel": 0.5}, knn_top1=knn, linear_top1=0.25, epochs=2.0, images_seen=64,
                   images_per_s=100.0, seconds=60.0)  # fmt: skip

    about = dict(date="d", command="c", commit="x", device="CPU", machine="m", precision="fp32", versions={"torch": "2"},
                 encoder="vit", train_images=32, val_images=100, classes=4, seeds=[0, 1, 2])  # fmt: skip
    rows = [row(0, 0.25), row(1, 0.5), Row("mae", 2, error="exit code 5: a | b\nc")]
    text = markdown(about, rows)
    good, failed = (line for line in text.splitlines() if line.startswith("| mae |"))
    assert good == "| mae | pixel 0.5000 | 37.5 (25.0 to 50.0) | 25.0 | 2 | 64 | 100 | 1.0 |"
    assert "**failed** (seed 2): exit code 5: a \\| b c |" in failed
    assert "n = 3 seeds" in text and "at most 5.0 points" in text and "chance 25.0 %" in text
