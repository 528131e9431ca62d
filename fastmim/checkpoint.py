"""Checkpoints that exist whole or not at all.

A checkpoint is a folder `step-0000123`: files are written into a temporary folder beside it, a manifest with their
SHA-256 is added, everything is fsynced, the folder is renamed, and only then `LATEST` is replaced and older ones are
deleted. Nothing in it is a pickle. A folder without a valid manifest does not count as a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

MANIFEST, LATEST = "manifest.json", "LATEST"
SCHEMA = 1


class CheckpointError(Exception):
    """No checkpoint, or not one that may be trusted."""

    exit_code = 3


def folder_name(step: int) -> str:
    return f"step-{step:07d}"


def steps_on_disk(root: Path) -> list[int]:
    """Steps of the finished checkpoint folders under `root`, oldest first."""
    names = [re.fullmatch(r"step-(\d{7,})", p.name) for p in root.iterdir()] if root.is_dir() else []
    return sorted(int(m[1]) for m in names if m)


def recover(root: Path) -> None:
    """Puts back a checkpoint that was put aside when its replacement was killed before it had the name."""
    for replaced in root.glob("step-*.replaced"):
        if (root / replaced.stem).exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, root / replaced.stem)


def set_aside(root: Path, after: int) -> list[int]:
    """Moves checkpoints later than step `after` to `root/abandoned`: they belong to a course that was given up."""
    later = [step for step in steps_on_disk(root) if step > after]
    for step in later:
        (root / "abandoned").mkdir(exist_ok=True)
        shutil.rmtree(root / "abandoned" / folder_name(step), ignore_errors=True)
        os.rename(root / folder_name(step), root / "abandoned" / folder_name(step))
    if later:
        _write_latest(root, after)
    return later


def prepare(root: Path) -> Path:
    """A new temporary folder for one checkpoint; leftovers of killed saves go."""
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    for stale in root.glob("step-*.tmp-*"):
        shutil.rmtree(stale)
    temporary = root / f"step-new.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def commit(temporary: Path, root: Path, step: int, meta: dict, keep: int) -> Path:
    """Turns a filled temporary folder into the checkpoint of `step`.

    Args:
        temporary: what `prepare` gave.
        meta: JSON values to store in the manifest.
        keep: how many of the newest checkpoints stay.
    """
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "meta": meta,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    # The manifest carries its own hash, so that a flipped bit in it is found like any other.
    body = {"manifest": manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (temporary / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True))
    for path in [*files, temporary / MANIFEST]:
        _fsync(path)
    _fsync(temporary)
    final, replaced = root / folder_name(step), root / f"{folder_name(step)}.replaced"
    if final.exists():
        # The same step saved again by a resumed run: put the old one aside, where `recover` finds it after a kill.
        os.rename(final, replaced)
    os.rename(temporary, final)
    _fsync(root)
    _write_latest(root, step)
    shutil.rmtree(replaced, ignore_errors=True)
    _delete_old(root, keep)
    return final


def verify(folder: Path) -> dict:
    """Checks every file against the manifest before any weight is used.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        body = json.loads((folder / MANIFEST).read_text())
        manifest = body["manifest"]
        text = json.dumps(manifest, indent=1, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != body["sha256"]:
            raise CheckpointError(f"{folder / MANIFEST}: its hash does not match its content")
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(f"{folder / MANIFEST}: expected schema {SCHEMA}, got {manifest['schema']}")
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable ({e})") from e
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: expected {expected['bytes']} bytes, got {path.stat().st_size}")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 does not match the manifest")
    return manifest


def find(root: Path, step: int | None, say: Callable[[str], None]) -> tuple[Path, dict]:
    """The newest valid checkpoint, or that of `step`; says which ones it passed over.

    Raises:
        CheckpointError: if there is none.
    """
    recover(root)
    candidates = steps_on_disk(root)[::-1] if step is None else [step]
    problems = []
    for candidate in candidates:
        folder = root / folder_name(candidate)
        try:
            return folder, verify(folder)
        except CheckpointError as e:
            problems.append(str(e))
            say(f"checkpoint passed over: {e}")
    wanted = "any checkpoint" if step is None else f"a checkpoint of step {step}"
    found = ", ".join(map(str, steps_on_disk(root))) or "none"
    raise CheckpointError(
        f"{root}: expected {wanted} that is valid, got none (steps on disk: {found}{'; ' if problems else ''}"
        f"{'; '.join(problems)}); start anew with another --out, or with --resume auto"
    )


def _write_latest(root: Path, step: int) -> None:
    temporary = root / f"{LATEST}.tmp"
    temporary.write_text(folder_name(step) + "\n")
    _fsync(temporary)
    os.replace(temporary, root / LATEST)
    _fsync(root)


def _delete_old(root: Path, keep: int) -> None:
    for step in steps_on_disk(root)[:-keep]:
        folder = root / folder_name(step)
        # Without its manifest a half-deleted folder cannot be taken for a checkpoint.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
