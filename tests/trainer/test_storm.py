"""Storms: runs killed at random moments, and checkpoints with random damage. Both print what was survived.

FASTMIM_STORM=200 makes the kills 200 (about 15 minutes on two idle cores); the damages are 1,000 always.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from storm import storm, table

from fastmim import checkpoint
from fastmim.checkpoint import CheckpointError

KILLS = int(os.environ.get("FASTMIM_STORM", "6"))
DAMAGES = 1000


@pytest.mark.timeout(7200 if KILLS > 20 else 300)
def test_every_killed_run_goes_on_by_itself_to_the_same_weights(tmp_path, capsys):
    began, tallies = time.monotonic(), []
    storm(KILLS, tmp_path, tallies)
    with capsys.disabled():
        print(f"\n{table(tallies, time.monotonic() - began)}")
    assert sum(t.total for t in tallies) >= KILLS
    assert all(t.resumed == t.total and t.runs for t in tallies)


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint with the files of a real one, of some kilobytes each."""
    torch.manual_seed(step)
    temporary = checkpoint.prepare(root)
    files = {
        "model.safetensors": {"weight": torch.randn(40, 30), "bias": torch.randn(30).bfloat16(), "n": torch.tensor(3)},
        "optimizer.safetensors": {"exp_avg.weight": torch.randn(40, 30), "step.weight": torch.tensor(float(step))},
        "boxes.safetensors": {"boxes": torch.rand(50, 4)},
    }
    hashes = {name: checkpoint.write_tensors(temporary / name, tensors) for name, tensors in files.items()}
    meta = {"config": {"seed": 1, "method": "mae"}, "state": {"skipped_steps": [3]}, "grad_norm": repr(float("nan"))}
    return checkpoint.commit(temporary, root, step, meta, 9, hashes)


def damaged(data: bytes, kind: str, rng: random.Random) -> bytes:
    """The content with one bit flipped, cut off, zeroed in part, longer, or with two bytes exchanged."""
    at = rng.randrange(len(data))
    if kind == "bit flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "truncation":
        return data[:at]
    if kind == "zeroed block":
        return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]
    return data + data[at:][:64]


def test_every_damage_is_found_before_a_weight_is_used(tmp_path, capsys):
    rng = random.Random(1)
    good, bad = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    files = {path: path.read_bytes() for path in sorted(bad.iterdir())}
    found, tried = Counter(), Counter()
    kinds = ["bit flip"] * DAMAGES + ["truncation", "zeroed block", "longer"] * 40
    for kind in kinds:
        path = rng.choices(list(files), [len(data) for data in files.values()])[0]
        data = damaged(files[path], kind, rng)
        if data == files[path]:
            continue  # zeros where zeros were
        path.write_bytes(data)
        tried[path.name, kind] += 1
        said: list[str] = []
        folder, manifest = checkpoint.find(tmp_path, None, said.append)
        assert folder == good and manifest["step"] == 1, f"{kind} of {path.name} was not noticed"
        assert len(said) == 1 and str(path) in said[0], said
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.find(tmp_path, 2, said.append)
        found[path.name, kind] += 1
        path.write_bytes(files[path])
    assert checkpoint.find(tmp_path, None, print)[0] == bad
    assert sum(n for (_, kind), n in found.items() if kind == "bit flip") == DAMAGES
    with capsys.disabled():
        print(f"\n{damage_table(found, tried)}")


def damage_table(found: Counter, tried: Counter) -> str:
    kinds = sorted({kind for _, kind in tried})
    lines = [f"| file | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for name in sorted({name for name, _ in tried}):
        cells = [f"{found[name, kind]} of {tried[name, kind]}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\nfound / made; each time the file was named, and the checkpoint before was taken"


def test_a_manifest_in_another_layout_is_not_taken(tmp_path):
    """The same content, written otherwise: nobody but us writes manifests, so somebody changed it."""
    manifest = write_checkpoint(tmp_path, 1) / checkpoint.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    with pytest.raises(CheckpointError, match="its hash does not match its content"):
        checkpoint.find(tmp_path, None, print)
