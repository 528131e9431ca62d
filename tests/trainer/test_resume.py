"""Interrupted runs go on as if nothing had happened: kill -9, signals, rewinds, other engines and world sizes."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from trainer_run import ROOT, TINY, command, environment, losses, metrics, train

STEPS = 16
TIMED = ("images_per_s", "step_ms", "data_wait", "peak_mib")


def arguments(images: Path, out: Path, *extra: str, method="cmae") -> list[str]:
    # 36 images, batch 8: 4 steps per epoch; saving every 3 steps puts checkpoints inside epochs.
    return ["--method", method, "--data", str(images / "train"), *TINY, "--steps", str(STEPS), "--save-every", "3",
            "--warmup", "5", "--out", str(out), *extra]  # fmt: skip


def last_checkpoint(out: Path) -> Path:
    return out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()


def assert_same_run(out: Path, straight: Path) -> None:
    """Weights, moments and metrics (but for times) are equal bit for bit."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(last_checkpoint(out) / name), load_file(last_checkpoint(straight) / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not ours[key].equal(theirs[key])]
        assert not different, f"{name}: {different[:5]}"
    strip = [[{k: v for k, v in r.items() if k not in TIMED} for r in metrics(o)] for o in (out, straight)]
    assert strip[0] == strip[1]


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = train(arguments(images, out))
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == STEPS
    return out


def test_same_command_twice_is_bit_equal(images, straight, tmp_path):
    done = train(arguments(images, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", straight)


def start(images: Path, out: Path, *extra: str, launcher="python", processes=1) -> subprocess.Popen:
    return subprocess.Popen(
        command(launcher, processes, arguments(images, out, *extra)), env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher (or the process itself)."""
    front = psutil.Process(process.pid)
    found = [p for p in front.children(recursive=True) if any(a.endswith("fastmim/train.py") for a in p.cmdline())]
    return found or [front]


def wait_for_lines(out: Path, count: int, process: subprocess.Popen, limit_s: float = 120) -> None:
    """Until metrics.jsonl has so many lines, or the process ended."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    assert process.poll() is not None, "the run neither went on nor ended"


def stop_after_lines(images: Path, out: Path, count: int) -> None:
    """A run that is told to stop, and saves, once it has logged so many lines."""
    process = start(images, out)
    wait_for_lines(out, count, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said


def test_kill_at_random_moments_then_resume_is_bit_equal(images, straight, tmp_path):
    out, rng, kills = tmp_path / "run", random.Random(7), 0
    for line in (2, 6, 9, 13):
        process = start(images, out, "--resume", "auto")
        wait_for_lines(out, line, process)
        time.sleep(rng.uniform(0, 0.3))  # inside a step, a save, a rename: wherever it falls
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    done = train(arguments(images, out, "--resume", "auto"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert kills >= 3
    assert_same_run(out, straight)
    assert not list((out / "checkpoints").glob("*.tmp-*")), "leftovers of killed saves"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_signal_saves_and_exits_75(images, straight, tmp_path, number):
    out = tmp_path / "run"
    process = start(images, out)
    wait_for_lines(out, 4, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    saved = json.loads((last_checkpoint(out) / "manifest.json").read_text())["manifest"]["step"]
    assert 4 <= saved < STEPS
    assert f"stopped by signal at step {saved}" in said
    done = train(arguments(images, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {saved}" in done.stdout
    assert_same_run(out, straight)


def test_resume_at_a_given_step_sets_later_checkpoints_aside(images, straight, tmp_path):
    out = tmp_path / "run"
    assert train(arguments(images, out, "--keep", "9")).returncode == 0
    done = train(arguments(images, out, "--keep", "9", "--resume", "6"))
    assert done.returncode == 0, done.stderr
    assert "resumed at step 6" in done.stdout
    assert sorted(p.name for p in (out / "checkpoints" / "abandoned").iterdir())[0] == "step-0000009"
    assert_same_run(out, straight)


def test_resume_without_arguments_takes_them_from_the_run(images, straight, tmp_path):
    out = tmp_path / "run"
    stop_after_lines(images, out, 5)
    done = train(["--out", str(out), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(out, straight)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(images, straight, tmp_path):
    out = tmp_path / "run"
    stop_after_lines(images, out, 8)
    victim = last_checkpoint(out) / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = train(arguments(images, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"checkpoint passed over: {victim}" in done.stdout
    assert_same_run(out, straight)


def test_bare_resume_with_nothing_to_resume_exits_3(images, tmp_path):
    done = train(arguments(images, tmp_path / "run", "--resume"))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "expected any checkpoint that is valid, got none" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "chain",
    [
        [("python", 1, []), ("torchrun", 2, ["--zero", "2"]), ("torchrun", 2, [])],
        [("torchrun", 2, ["--zero", "3"]), ("python", 1, []), ("torchrun", 2, ["--zero", "1"])],
        [("torchrun", 2, ["--zero", "0"]), ("python", 1, ["--zero", "3"]), ("python", 1, [])],
    ],
    ids=["single-zero2-ddp", "zero3-single-zero1", "zero0-zero3-single"],
)
def test_resume_on_another_engine_and_world_size_goes_on_with_the_same_losses(images, straight, tmp_path, chain):
    out = tmp_path / "run"
    for (launcher, processes, extra), until in zip(chain, (6, 10, None)):
        process = start(images, out, "--resume", "auto", *extra, launcher=launcher, processes=processes)
        if until is not None:
            wait_for_lines(out, until, process)
            # One rank alone is asked to stop: all of them must agree on the step.
            ranks(process)[-1].send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=120)
        assert ("stopped by signal" in said) if until else ("done " in said), said
    assert losses(out) == pytest.approx(losses(straight), rel=5e-6)
