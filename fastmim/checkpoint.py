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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MANIFEST, LATEST = "manifest.json", "LATEST"
SCHEMA = 1
# Names of number types in a safetensors header. Source: huggingface/safetensors, README, section Format.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK_BYTES = 16 << 20


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
            rename(replaced, root / replaced.stem)


def set_aside(root: Path, after: int) -> list[int]:
    """Moves checkpoints later than step `after` to `root/abandoned`: they belong to a course that was given up."""
    later = [step for step in steps_on_disk(root) if step > after]
    for step in later:
        (root / "abandoned").mkdir(exist_ok=True)
        shutil.rmtree(root / "abandoned" / folder_name(step), ignore_errors=True)
        rename(root / folder_name(step), root / "abandoned" / folder_name(step))
    if later:
        _write_latest(root, after)
    return later


def tidy(root: Path, step: int, keep: int) -> None:
    """Finishes what a killed save of `step` may have left undone: LATEST, and the end of older ones."""
    latest = root / LATEST
    if not latest.is_file() or latest.read_bytes() != f"{folder_name(step)}\n".encode():
        _write_latest(root, step)
    _remove_stale(root)
    _delete_old(root, keep)


def _remove_stale(root: Path) -> None:
    for stale in root.glob("step-*.tmp-*"):
        shutil.rmtree(stale)


def prepare(root: Path) -> Path:
    """A new temporary folder for one checkpoint; leftovers of killed saves go."""
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    _remove_stale(root)
    temporary = root / f"step-new.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes a safetensors file chunk by chunk, so that nothing is copied and a full disk is an OSError.

    Args:
        tensors: on the CPU, contiguous.

    Returns:
        SHA-256 of what was meant to be written: what the disk makes of it later is compared with that.
    """
    # Wide types first: then each tensor begins at a multiple of its item size, as readers that map the file expect.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        dtype, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        write(file, len(text).to_bytes(8, "little") + text, digest.update)
        for name in order:
            data = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
            for at in range(0, len(data), CHUNK_BYTES):
                write(file, data[at : at + CHUNK_BYTES], digest.update)
    return digest.hexdigest()


def write(file: BinaryIO, data: bytes | memoryview, digest: Callable[[bytes | memoryview], None]) -> None:
    digest(data)
    file.write(data)


def commit(
    temporary: Path, root: Path, step: int, meta: dict, keep: int, hashes: Mapping[str, str] | None = None
) -> Path:
    """Turns a filled temporary folder into the checkpoint of `step`.

    Args:
        temporary: what `prepare` gave.
        meta: JSON values to store in the manifest.
        keep: how many of the newest checkpoints stay.
        hashes: SHA-256 by file name, where it is known already.
    """
    files = sorted(p for p in temporary.iterdir() if p.is_file())
    known = hashes or {}
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "meta": meta,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": known.get(p.name) or _sha256(p)} for p in files},
    }
    (temporary / MANIFEST).write_text(_manifest_text(manifest))
    for path in [*files, temporary / MANIFEST, temporary]:
        fsync(path)
    final, replaced = root / folder_name(step), root / f"{folder_name(step)}.replaced"
    if final.exists():
        # The same step saved again by a resumed run: put the old one aside, where `recover` finds it after a kill.
        rename(final, replaced)
    rename(temporary, final)
    fsync(root)
    _write_latest(root, step)
    if keep == 1:
        verify(final)  # there will be no other to fall back to
    shutil.rmtree(replaced, ignore_errors=True)
    _delete_old(root, keep)
    return final


def _manifest_text(manifest: dict) -> str:
    # The manifest carries its own hash, so that a flipped bit in it is found like any other.
    text = json.dumps(manifest, indent=1, sort_keys=True)
    body = {"manifest": manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(body, indent=1, sort_keys=True)


def verify(folder: Path) -> dict:
    """Checks every file against the manifest before any weight is used.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)["manifest"]
        if _manifest_text(manifest) != text:
            raise CheckpointError(f"{folder / MANIFEST}: its hash does not match its content")
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(f"{folder / MANIFEST}: expected schema {SCHEMA}, got {manifest['schema']}")
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable ({e})") from e
    for name, expected in files.items():
        path = folder / name
        try:
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path}: expected {expected['bytes']} bytes, got {path.stat().st_size}")
            found = _sha256(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        except OSError as e:
            raise CheckpointError(f"{path}: unreadable ({e})") from e
        if found != expected["sha256"]:
            raise CheckpointError(
                f"{path}: its SHA-256 does not match the manifest: expected {expected['sha256'][:12]}..., got {found[:12]}..."
            )
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
    fsync(temporary)
    replace(temporary, root / LATEST)
    fsync(root)


def _delete_old(root: Path, keep: int) -> None:
    for step in steps_on_disk(root)[:-keep]:
        remove(root / folder_name(step))


def remove(folder: Path) -> None:
    # Without its manifest a half-deleted folder cannot be taken for a checkpoint.
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def replace(old: Path, new: Path) -> None:
    os.replace(old, new)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
