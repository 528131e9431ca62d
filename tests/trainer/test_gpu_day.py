"""`bench/gpu_day.sh` without a GPU: the same commands on CPU tensors at tiny sizes."""

import json
import os
import re
import subprocess
import sys

import pytest
from trainer_run import ROOT

SCRIPT = ROOT / "bench" / "gpu_day.sh"
SLICES = range(1, 14)


def gpu_day(*arguments: str, out=None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTMIM")}
    env |= {"PYTHON": sys.executable, "FASTMIM_GPU_DAY_DRY": "1", "FASTMIM_GPU_DAY_OUT": str(out)}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


def test_slices_are_listed():
    found = gpu_day()
    assert found.returncode == 2
    assert [int(n) for n in re.findall(r"^  (\d+) ", found.stdout, re.MULTILINE)] == list(SLICES)
    assert gpu_day("14").returncode == 2 and gpu_day("x").returncode == 2


def test_a_missing_package_is_one_line(tmp_path):
    """A Python without site-packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    env = {**os.environ, "PYTHON": str(bare)}
    found = subprocess.run(["bash", str(SCRIPT), "1"], env=env, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "pip install --target build/packages torch" in found.stderr


def test_numerics_are_rehearsed(tmp_path):
    found = gpu_day("1", out=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "a rehearsal on CPU tensors" in found.stdout
    records = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert [(r["op"], r["wrong"]) for r in records] == [("gather", 0), ("masks", 0)]
    assert "| gather |" in (tmp_path / "checks.md").read_text() and (tmp_path / "slice-1.log").exists()


@pytest.mark.skipif(not os.environ.get("FASTMIM_GPU_DAY"), reason="FASTMIM_GPU_DAY=1: rehearses every slice, minutes")
@pytest.mark.timeout(600)  # a slice may take 9 minutes
@pytest.mark.parametrize("number", SLICES)
def test_every_slice_is_rehearsed(number, tmp_path):
    found = gpu_day(str(number), out=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert list(tmp_path.glob("*.jsonl")) and list(tmp_path.glob("*.md"))
