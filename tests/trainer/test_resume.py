"""Interrupted runs go on as if nothing had happened: kill -9, signals, rewinds, other engines and world sizes."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fork_server import Ranks
from storm import differences, last_checkpoint
from trainer_run import ROOT, TINY, command, environment, losses, train

STEPS = 16


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    # 36 images, batch 8: 4 steps per epoch; saving every 3 steps puts checkpoints inside epochs.
    return ["--method", "cmae", "--data", str(images / "train"), *TINY, "--steps", str(STEPS), "--save-every", "3",
            "--warmup", "5", "--out", str(out), *extra]  # fmt: skip


@pytest.fixture(scope="module")
def straight(images, server, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight") / "run"
    server.run(["train", *arguments(images, out)])
    assert len(losses(out)) == STEPS
    return out


def test_same_command_by_the_script_door_is_bit_equal(images, straight, tmp_path):
    done = train(arguments(images, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert not differences(tmp_path / "run", straight)


@pytest.fixture
def start(images, server, tmp_path):
    """Starts the run in tmp_path/run; returns the job."""
    return lambda *extra: server.start(["train", *arguments(images, tmp_path / "run", *extra)])


def wait_for_lines(out: Path, count: int, is_running: Callable[[], bool], limit_s: float = 120) -> None:
    """Until metrics.jsonl has so many lines, or the run ended."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and is_running():
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    assert not is_running(), "the run neither went on nor ended"


def stop_after_lines(start: Callable[..., Ranks], out: Path, count: int, number: int = signal.SIGTERM) -> str:
    """A run that is told to stop, and saves, once it has logged so many lines; what it said."""
    job = start()
    wait_for_lines(out, count, job.is_running)
    job.kill(0, number)
    return job.expect(75)


def test_kill_at_random_moments_then_resume_is_bit_equal(start, straight, tmp_path):
    out, rng, kills = tmp_path / "run", random.Random(7), 0
    for line in (2, 6, 9, 13):
        job = start("--resume", "auto")
        wait_for_lines(out, line, job.is_running)
        time.sleep(rng.uniform(0, 0.3))  # inside a step, a save, a rename: wherever it falls
        if job.is_running():
            job.kill(0)
        kills += job.wait() == [-9]
    start("--resume", "auto").expect()
    assert kills >= 2, "it was too fast for this test"
    assert not differences(out, straight)
    assert not list((out / "checkpoints").glob("*.tmp-*")), "leftovers of killed saves"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_signal_saves_and_exits_75(start, straight, tmp_path, number):
    out = tmp_path / "run"
    said = stop_after_lines(start, out, 4, number)
    saved = json.loads((last_checkpoint(out) / "manifest.json").read_text())["manifest"]["step"]
    assert 4 <= saved < STEPS
    assert f"stopped by signal at step {saved}" in said
    assert f"resumed at step {saved}" in start("--resume").expect()
    assert not differences(out, straight)


def test_resume_at_a_given_step_sets_later_checkpoints_aside(start, straight, tmp_path):
    out = tmp_path / "run"
    start("--keep", "9").expect()
    assert "resumed at step 6" in start("--keep", "9", "--resume", "6").expect()
    assert sorted(p.name for p in (out / "checkpoints" / "abandoned").iterdir())[0] == "step-0000009"
    assert not differences(out, straight)


def test_resume_without_arguments_takes_them_from_the_run(start, server, straight, tmp_path):
    out = tmp_path / "run"
    stop_after_lines(start, out, 5)
    server.run(["train", "--out", str(out), "--resume"])
    assert not differences(out, straight)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(start, straight, tmp_path):
    out = tmp_path / "run"
    stop_after_lines(start, out, 8)
    victim = last_checkpoint(out) / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert f"checkpoint passed over: {victim}" in start("--resume").expect()
    assert not differences(out, straight)


def test_bare_resume_with_nothing_to_resume_exits_3(start, tmp_path):
    assert "expected any checkpoint that is valid, got none" in start("--resume").expect(3)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def ranks(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [p for p in below if any(a.endswith("fastmim/train.py") for a in p.cmdline())]


def test_a_signal_below_a_launcher_and_another_engine_go_on_with_the_same_losses(images, start, straight, tmp_path):
    """ZeRO-3 under torchrun, then one plain process; test_elastic has the other engines."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("torchrun", 2, arguments(images, out, "--zero", "3")), env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_lines(out, 6, lambda: process.poll() is None)
    # One rank alone is asked to stop: all of them must agree on the step.
    ranks(process)[-1].send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert "stopped by signal" in said, said
    start("--resume").expect()
    assert losses(out) == pytest.approx(losses(straight), rel=5e-6)
