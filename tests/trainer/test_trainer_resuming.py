"""What a run must have in common with the checkpoint that it continues; above all, the images that are left out."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from trainer_run import TINY

from fastmim import checkpoint
from fastmim.arguments import parse_train
from fastmim.cli import run
from fastmim.config import ConfigError, to_plain
from fastmim.resuming import check_same_run, exclusion


def write_list(path: Path, names: list[str]) -> Path:
    path.write_text("".join(json.dumps({"name": name, "reason": "cut"}) + "\n" for name in names))
    return path


def test_exclusion_is_of_the_names_alone(tmp_path):
    one, other = (write_list(tmp_path / f"{i}.jsonl", names) for i, names in enumerate((["a", "b"], ["b", "a"])))
    other.write_text(other.read_text().replace("cut", "half a file") + "\n")
    assert exclusion(one) == exclusion(other)
    assert exclusion(one) != exclusion(write_list(tmp_path / "c.jsonl", ["a", "c"]))
    assert exclusion(None) is None


def meta_of(config, **more) -> dict:
    return {"config": to_plain(config), **more}


def test_same_run_compares_what_is_fixed():
    config = parse_train(["--method", "mae"])
    check_same_run(Path("step-3"), meta_of(config, excluded=None), config, None)
    for changes, words in (
        ({"batch_size": 64}, "step-3 was trained with batch_size = 32, this run has 64; use the same value"),
        ({"seed": 1}, "was trained with seed = 0, this run has 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            other = dataclasses.replace(config, **changes)
            check_same_run(Path("step-3"), meta_of(config, excluded=None), other, None)


@pytest.mark.parametrize(
    ("saved", "theirs", "ours", "is_same"),
    [
        ({"excluded": "x"}, "a", "x", True), ({"excluded": "x"}, "a", "y", False), ({"excluded": "x"}, "a", None, False),
        ({"excluded": None}, None, "y", False), ({}, "a", "y", True), ({}, None, None, True), ({}, None, "y", False),
        ({}, "a", None, False),
    ],
    ids=["same", "other", "none_now", "none_then", "old_with_list", "old_without", "old_none_then", "old_none_now"],
)  # fmt: skip
def test_same_run_compares_lists_and_lets_old_checkpoints_through(saved, theirs, ours, is_same):
    config = parse_train(["--method", "mae"])
    then = dataclasses.replace(config, exclude=None if theirs is None else Path(theirs))
    now = dataclasses.replace(config, exclude=None if ours is None else Path("b"))
    if is_same:
        check_same_run(Path("step-3"), meta_of(then, **saved), now, ours)
        return
    with pytest.raises(ConfigError, match=r"trained with exclude = .+, this run has .+ use the same list") as error:
        check_same_run(Path("step-3"), meta_of(then, **saved), now, ours)
    assert "\n" not in str(error.value)


def test_other_images_are_refused_and_other_names_are_told(images, tmp_path, capsys):
    data = tmp_path / "images"
    shutil.copytree(images / "train", data)
    flags = ["train", "--method", "mae", "--data", str(data), *TINY, "--model", "vit_pico", "--out", str(tmp_path / "run"),
             "--mae.decoder-width", "32", "--mae.decoder-depth", "1"]  # fmt: skip
    assert run([*flags, "--steps", "1"]) == 0
    victim = data / "class1" / "004.jpg"
    shutil.copy(victim, data / "class1" / "one-more.jpg")
    assert run([*flags, "--steps", "2", "--resume"]) == 2
    said = capsys.readouterr().err
    assert (
        f"was trained on 36 images, {data} has 37, which would change the order of all" in said
        and said.count("\n") == 1
    )
    victim.unlink()
    assert run([*flags, "--steps", "2", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "warning   " in said and "as many images as the run began with, under other names" in said


def test_a_changed_list_is_refused_and_a_moved_one_is_not(images, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--model", "vit_pico", "--out", str(out),
             "--mae.decoder-width", "32", "--mae.decoder-depth", "1"]  # fmt: skip
    names = [f"class0/{i:03d}.jpg" for i in range(4)]
    first = write_list(tmp_path / "first.jsonl", names)
    assert run([*flags, "--steps", "1", "--exclude", str(first)]) == 0
    folder = next((out / "checkpoints").glob("step-*"))
    assert checkpoint.verify(folder)["meta"]["excluded"] == exclusion(first)

    first.write_text(write_list(tmp_path / "other.jsonl", names[:3]).read_text())
    assert run([*flags, "--steps", "2", "--exclude", str(first), "--resume"]) == 2
    assert "leaves out other images; use the same list" in capsys.readouterr().err
    moved = write_list(tmp_path / "moved.jsonl", names[::-1])
    assert run([*flags, "--steps", "2", "--exclude", str(moved), "--resume"]) == 0
    assert "resumed at step 1" in capsys.readouterr().out
