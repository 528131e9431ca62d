"""Mistakes that a user will make: one clear line, the right exit code, nothing written, no device touched."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from trainer_run import ROOT, TINY, environment, write_images

from fastmim import cli
from fastmim.usage import one_line

SMALL = [*TINY, "--steps", "2"]


def run(capsys, *argv: str) -> tuple[int, str]:
    """One command in this process; returns (exit code, what it said on stderr)."""
    try:
        code = cli.run(list(argv))
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["trian"],
            "expected a command (train, knn, linear, record-tokens, pack, verify-data, doctor, replay, zero-import, demo-data, plan, bench, tune, info), got trian; did you mean train?",
        ),
        (["train", "--batchsize", "3"], "did you mean --batch-size?"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--precision", "bf61"], "--precision"),
        (["knn", "nowhere"], "--data"),
        (["demo-data", "photos", "--images", "many"], "--images"),
        (["train", "--method", "mea"], "--method: expected one of cae, cmae, icmae, mae, mixedae, simmim"),
        (["train", "--data", "nowhere", *SMALL], "nowhere"),
        (["train", "--data", "empty", *SMALL], "empty: expected images"),
        (["train", "--data", "images", *SMALL, "--batch-size", "7", "--accumulate", "2"], "take 6 or 8"),
        (["train", "--data", "images", *SMALL, "--batch-size", "64"], "expected at most the 12 images"),
        (
            ["train", "--data", "images", *SMALL, "--image-size", "18"],
            "divisible by the patch size 4, got 18; take 16 or 20",
        ),
        (["train", "--data", "images", *SMALL, "--method", "mae", "--mae.mask-ratio", "0.99"], "which keeps 0"),
        (
            ["train", "--data", "images", *SMALL, "--cmae.mask-cell", "3"],
            "expected a divisor of the patch grid 4 x 4, got 3",
        ),
        (
            ["train", "--data", "images", *SMALL, "--image-size", "12", "--cmae.mask-cell", "2"],
            "expected a divisor of the patch grid 3 x 3",
        ),
        (["train", "--data", "images", *SMALL, "--loader", "dalli"], "loader: expected one of auto"),
        (["train", "--data", "images", *SMALL, "--out", "images/train/class0/000.jpg"], "--out: expected a folder"),
        (
            ["train", "--data", "images", *SMALL, "--out", "images/train/run"],
            "--out: expected a folder outside of the images",
        ),
        (["train", "--data", "images", *SMALL, "--out", "held"], "--out: held already holds a run; add --resume"),
        (["train", "--data", "images", *SMALL, "--tracker", "wandb"], "pip install 'fastmim[wandb]'"),
        (
            ["knn", "nowhere", "--data", "images/train", "--val-data", "images/val"],
            "nowhere: expected an encoder.safetensors",
        ),
        (["demo-data", "images"], "images"),
    ],
    ids=lambda value: " ".join(v for v in value if v not in SMALL)[:60] if isinstance(value, list) else "",
)
def test_mistake_is_one_line_and_exit_2(argv, words, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images" / "train", 4)
    write_images(tmp_path / "images" / "val", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    if argv[-1] == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    code, said = run(capsys, *argv)
    assert code == 2, said
    assert words in said
    assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--resume"], ["--resume", "--out", "nothing"], ["--resume", "7", "--out", "nothing"]]
)
def test_a_run_that_is_not_there_is_told_before_any_data_are_drawn(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, "train", "--method", "mae", *flags)
    assert code == 3 and "--resume: expected a run with checkpoints in" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Value error ─────╮\n│ \x1b[91;1mError parsing --steps:\x1b[0m invalid │\n│ literal: 'many' │\n│ ───────── │\n"
        "│ Argument helptext: │\n╰──────────╯\n",
        " Value error \n ----------- \n  Error parsing --steps: invalid\n  literal: 'many'\n  -------\n  Argument helptext:\n",
    ],
    ids=["drawn", "plain"],
)
def test_what_the_parser_says_in_a_box_is_one_line(box):
    assert one_line(box) == "--steps: invalid literal: 'many'"


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_exits_2(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, "train", "--data", str(images), *SMALL, "--device", "cuda")
    assert code == 2 and "--device cuda: expected a GPU" in said


def test_dry_run_checks_and_writes_nothing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "--data", str(images), *SMALL, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "parameters to train" in said and "plan      2 steps, 4 per epoch, 16 images" in said
    assert not list(tmp_path.iterdir())


def test_folder_in_use_names_its_holder(images, tmp_path):
    out = tmp_path / "run"
    from fastmim.config import ConfigError
    from fastmim.run_directory import RunDirectory

    held = RunDirectory(out, resuming=False)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
        RunDirectory(out, resuming=True)
    held.close()
    RunDirectory(out, resuming=True).close()


def test_a_run_that_began_and_ended_meanwhile_keeps_its_folder(tmp_path, monkeypatch):
    """Between the first look at the folder and the lock."""
    from fastmim.config import ConfigError
    from fastmim.run_directory import CONFIG_FILE, RunDirectory

    monkeypatch.setattr(RunDirectory, "_claim", lambda self: (self.path / CONFIG_FILE).write_text("seed: 1\n"))
    with pytest.raises(ConfigError, match="already holds a run"):
        RunDirectory(tmp_path / "run", resuming=False)


def test_runs_that_start_within_a_second_have_folders_of_their_own(tmp_path, monkeypatch):
    from fastmim import run_directory

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda form: "20260101-000000")
    names = [run_directory.new_run("mae").name for _ in range(3)]
    assert names == ["mae-20260101-000000", "mae-20260101-000000-2", "mae-20260101-000000-3"]


def test_a_folder_that_cannot_be_made_exits_6(images, monkeypatch, capsys):
    code, said = run(capsys, "train", "--data", str(images), *SMALL, "--out", "/proc/run")
    assert code == 6
    assert (
        said.startswith("error: --out: expected a folder that can be written, got /proc/run (")
        and said.count("\n") == 1
    )


def test_corrupt_jpeg_names_the_path_and_skip_goes_on(images, server, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    victim, seen = data / "train" / "class1" / "004.jpg", data / "val" / "class0" / "000.jpg"  # the first to be drawn
    for path in (victim, seen):
        path.write_bytes(path.read_bytes()[:300])
    base = ["train", "--method", "mae", "--data", str(data), *TINY, "--steps", "8"]
    said = server.run([*base, "--out", str(tmp_path / "a")], code=4)
    assert str(victim) in said.splitlines()[-1] and "--on-bad-image skip" in said
    said = server.run([*base, "--out", str(tmp_path / "b"), "--on-bad-image", "skip"])
    assert "1 unreadable images were replaced" in said and str(victim) in said
    # k-NN and the pictures leave theirs out.
    for bad in (victim, seen):
        assert said.count(f"1 unreadable images of {bad.parents[1]} were left out, one of them {bad}: ") == 1
    assert (tmp_path / "b" / "reconstructions" / "step-0000008.png").is_file()


def test_door_of_another_checkout_names_both(tmp_path):
    (tmp_path / "fastmim").mkdir()
    shutil.copy(ROOT / "fastmim" / "train.py", tmp_path / "fastmim" / "train.py")
    door = [sys.executable, str(tmp_path / "fastmim" / "train.py"), "--help"]
    done = subprocess.run(door, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / "fastmim") in done.stderr and str(ROOT / "fastmim") in done.stderr


def test_door_without_installation_says_how_to_install(tmp_path):
    # -S: no site-packages, so that no installation is found.
    door = [sys.executable, "-S", str(ROOT / "fastmim" / "train.py")]
    done = subprocess.run(door, env=environment(PYTHONPATH=""), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "make setup" in done.stderr and "pip install -e" in done.stderr


def test_both_ranks_fail_with_one_line(images, server, tmp_path):
    argv = ["train", "--data", str(images), *SMALL, "--batch-size", "9", "--out", str(tmp_path / "r")]
    said = server.run(argv, world=2, code=2)
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_non_finite_gradients_touch_no_weight_and_end_with_5(images, server, tmp_path, precision):
    """A learning rate that blows up: the steps after it are skipped on the device, counted, and then the run ends."""
    out = tmp_path / "run"
    argv = ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--steps", "60", "--lr", "1e25",
            "--log-every", "3", "--save-every", "1", "--precision", precision, "--out", str(out)]  # fmt: skip
    assert "skipped for a non-finite gradient" in server.run(argv, code=5)
    skipped = [json.loads(line)["skipped_steps"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(skipped) >= 6
    newest = out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())
