"""Interrupted runs go on as if nothing had happened: kill -9, signals, rewinds, other engines and world sizes."""

import contextlib
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
    """Starts the run in tmp_path/run, with a fault if wanted; returns the job."""

    def start(*extra: str, fault: str = "") -> Ranks:
        return server.start(["train", *arguments(images, tmp_path / "run", *extra)], FASTMIM_FAULT=fault)

    return start


def stop_within_step(start: Callable[..., Ranks], step: int, number: int = signal.SIGTERM) -> str:
    """A run that is told to stop while it takes a step, the first being 1, and saves after it; what it said."""
    job = start(fault=f"step:forward:stop@{step}")
    job.wait_until_held()
    job.kill(0, number)
    job.go_on()
    return job.expect(75)


# So often, at least, a run passes these points that goes on from anywhere up to step 12 of 16, saving every third.
PASSAGES = {
    "step:forward": 4,
    "step:optimizer": 4,
    "save:write": 60,
    "save:fsync": 5,
    "save:rename": 1,
    "save:latest": 1,
}


def test_kill_at_random_moments_then_resume_is_bit_equal(start, straight, tmp_path):
    """At random passages of points in and out of saves; test_storm has kills at random times."""
    rng = random.Random(7)
    for point in rng.sample(sorted(PASSAGES), 4):
        job = start("--resume", "auto", fault=f"{point}:kill@{rng.randint(1, PASSAGES[point])}")
        assert job.wait() == [-9], job.said()
    start("--resume", "auto").expect()
    out = tmp_path / "run"
    assert not differences(out, straight)
    assert not list((out / "checkpoints").glob("*.tmp-*")), "leftovers of killed saves"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_signal_saves_and_exits_75(start, straight, tmp_path, number):
    out = tmp_path / "run"
    assert "stopped by signal at step 5:" in stop_within_step(start, 5, number)
    assert json.loads((last_checkpoint(out) / "manifest.json").read_text())["manifest"]["step"] == 5
    assert "resumed at step 5" in start("--resume").expect()
    assert not differences(out, straight)


def test_resume_at_a_given_step_sets_later_checkpoints_aside(start, straight, tmp_path):
    out = tmp_path / "run"
    start("--keep", "9").expect()
    assert "resumed at step 6" in start("--keep", "9", "--resume", "6").expect()
    assert sorted(p.name for p in (out / "checkpoints" / "abandoned").iterdir())[0] == "step-0000009"
    assert not differences(out, straight)


def test_resume_without_arguments_takes_them_from_the_run(start, server, straight, tmp_path):
    out = tmp_path / "run"
    stop_within_step(start, 6)
    server.run(["train", "--out", str(out), "--resume"])
    assert not differences(out, straight)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(start, straight, tmp_path):
    out = tmp_path / "run"
    stop_within_step(start, 9)
    victim = last_checkpoint(out) / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert f"checkpoint passed over: {victim}" in start("--resume").expect()
    assert not differences(out, straight)


def test_bare_resume_with_nothing_to_resume_exits_3(start, tmp_path):
    assert "--resume: expected a run with checkpoints in" in start("--resume").expect(3)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def held(launcher: subprocess.Popen) -> psutil.Process:
    """The process below a launcher that has stopped itself, once it has."""
    while launcher.poll() is None:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    return process
        time.sleep(0.01)
    pytest.fail(launcher.stdout.read())


def test_a_signal_below_a_launcher_and_another_engine_go_on_with_the_same_losses(images, start, straight, tmp_path):
    """ZeRO-3 under torchrun, then one plain process; test_elastic has the other engines."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("torchrun", 2, arguments(images, out, "--zero", "3")), env=environment(FASTMIM_FAULT="step:forward:stop@7#1"),
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    # One rank alone is asked to stop: all of them must agree on the step.
    rank_1 = held(process)
    rank_1.send_signal(signal.SIGUSR1)
    rank_1.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=120)
    assert "stopped by signal" in said, said
    start("--resume").expect()
    assert losses(out) == pytest.approx(losses(straight), rel=5e-6)
