"""Checkpoints exist whole or not at all; damage is found before a weight is used."""

import os
import shutil
from pathlib import Path

import pytest

from fastmim import checkpoint
from fastmim.checkpoint import CheckpointError


def write(root: Path, step: int, keep: int = 9, text: str = "weights") -> Path:
    temporary = checkpoint.prepare(root)
    (temporary / "model.safetensors").write_text(f"{text} {step}" * 50)
    (temporary / "optimizer.safetensors").write_text(f"moments {step}" * 50)
    return checkpoint.commit(temporary, root, step, {"config": {"seed": 1}}, keep)


def find(root: Path, step: int | None = None) -> tuple[int, list[str]]:
    said: list[str] = []
    _, manifest = checkpoint.find(root, step, said.append)
    return manifest["step"], said


def test_commit_writes_manifest_and_latest(tmp_path):
    folder = write(tmp_path, 12)
    assert folder.name == "step-0000012"
    assert (tmp_path / "LATEST").read_text() == "step-0000012\n"
    manifest = checkpoint.verify(folder)
    assert manifest["step"] == 12 and manifest["meta"] == {"config": {"seed": 1}}
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}


def test_keep_deletes_the_oldest_only(tmp_path):
    for step in (1, 2, 10, 100):
        write(tmp_path, step, keep=2)
    assert checkpoint.steps_on_disk(tmp_path) == [10, 100]


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_truncated_and_missing_files_fall_back(tmp_path, name, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    data = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    step, said = find(tmp_path)
    assert step == 1 and name in said[0]
    with pytest.raises(CheckpointError, match=name):
        find(tmp_path, step=2)


def test_nothing_valid_lists_what_was_found(tmp_path):
    with pytest.raises(CheckpointError, match="steps on disk: none"):
        find(tmp_path / "nowhere")
    (write(tmp_path, 5) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="steps on disk: 5"):
        find(tmp_path)


@pytest.mark.parametrize("victim", ["fsync", "rename", "replace"])
@pytest.mark.parametrize("call", range(8))
@pytest.mark.parametrize("same_step", [False, True], ids=["next-step", "same-step"])
def test_death_at_any_system_call_leaves_a_valid_checkpoint(tmp_path, monkeypatch, victim, call, same_step):
    """A save that dies at its n-th fsync or rename never costs the checkpoint before it."""
    write(tmp_path, 1)
    count = 0
    real = getattr(os, victim)

    def dies(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(os, victim, dies)
    died = False
    try:
        write(tmp_path, 1 if same_step else 2, keep=1, text="newer")
    except KeyboardInterrupt:
        died = True
    monkeypatch.undo()
    step, said = find(tmp_path)
    assert step in (1, 2) and not said
    if not died:
        assert count <= call, "the call was reached but did not die"
    # The next save works and clears what was left over.
    write(tmp_path, 3, keep=1)
    assert checkpoint.steps_on_disk(tmp_path) == [3]
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name or "replaced" in p.name]


def test_half_deleted_checkpoint_is_not_one(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def dies(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert find(tmp_path)[0] == 2


def test_set_aside_moves_later_steps_and_moves_latest_back(tmp_path):
    for step in (3, 6, 9):
        write(tmp_path, step)
    assert checkpoint.set_aside(tmp_path, 3) == [6, 9]
    assert find(tmp_path) == (3, []) and (tmp_path / "LATEST").read_text() == "step-0000003\n"
    assert sorted(p.name for p in (tmp_path / "abandoned").iterdir()) == ["step-0000006", "step-0000009"]


@pytest.mark.parametrize("victim", ["replace", "remove"])
def test_tidy_finishes_a_save_that_died_after_its_rename(tmp_path, monkeypatch, victim):
    """LATEST and the deletion of older ones come last: a run that has nothing more to save must not leave them undone."""
    write(tmp_path, 1)
    write(tmp_path, 2)

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, victim, dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 3, keep=1)
    assert find(tmp_path)[0] == 3
    checkpoint.tidy(tmp_path, 3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-0000003"]
    assert (tmp_path / "LATEST").read_text() == "step-0000003\n"
