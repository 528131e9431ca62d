"""Runs that go wrong on order: full disks, lost and stuck processes, slow ones, signals, dead workers.

The faults are those of fastmim/testing/faults.py. The reference is always the run in which nothing went wrong.

What else is asked of interrupted runs, and where it is tested:

R1 any stopping point      test_resume_points (each method; 1, 2, 4 processes), test_resume, test_box_runs
R2 ten resumes an epoch    pipelines/test_pipeline_folder (chain_of_resumes), pipelines/test_pipeline_resume
R3 orders of seeds, ranks  pipelines/test_pipeline_sampling, pipelines/test_pipeline_folder
R5 masks not replayed      test_resume_points (no_mask_comes_twice)
R6 kills                   test_storm (FASTMIM_STORM=200), `python tests/trainer/storm.py 200`
R7 each system call        test_checkpoint (death_at_any_system_call); here: a_failed_save, three_failed_saves
R8 damaged checkpoints     test_storm (every_damage), test_checkpoint, test_resume
R9 full disks              here: a_disk_that_is_really_full, a_disk_that_takes_nothing, the_last_save, metrics_that_cannot
R10 overlapping saves      test_saving
R11 accumulation           test_accumulation, test_micro_batches
R12 signals                here: a_signal_at_any_moment, a_signal_during_evaluation, the_second_signal; test_resume
R13 workers, stuck ranks   here: a_killed_worker, a_stopped_worker, full_shared_memory, the_watchdog; pipelines/test_pipeline_workers
R14 non-finite steps       test_nonfinite
R17 uneven data            test_ranks (any_size, uneven_data); here: a_file_that_only_one_rank_misses; test_agreement
R19 engine to engine       test_elastic
R25 surroundings           here: odd_names_and_surroundings, no_network
R26 one folder, two runs   here: a_second_run_in_the_folder, of_two_runs_that_start_at_once
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from storm import differences, last_checkpoint
from trainer_run import ROOT, TINY, command, environment, metrics

STEPS = 12
# A process stops itself in its fifth step, where the test finds it however slow either is. The checkpoint of step 2 is on
# disk then, because the save of step 4 has waited for it.
HELD = "step:forward:stop@5"


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    """12 steps of MAE; a checkpoint at every other step."""
    return ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--mae.decoder-width", "32", "--steps",
            str(STEPS), "--save-every", "2", "--out", str(out), *extra]  # fmt: skip


@pytest.fixture(scope="module")
def straight(images, server, tmp_path_factory) -> dict[int, Path]:
    """Runs of 1 and 2 processes in which nothing goes wrong."""
    outs = {}
    for world in (1, 2):
        outs[world] = tmp_path_factory.mktemp("straight") / "run"
        server.run(arguments(images, outs[world]), world=world)
    return outs


@pytest.fixture
def start(images, server, tmp_path):
    """Starts the run in tmp_path/run; returns the job."""

    def start(*extra: str, world: int = 1, fault: str = ""):
        return server.start(arguments(images, tmp_path / "run", *extra), world=world, FASTMIM_FAULT=fault)

    return start


def wait_for(text: str, job, *, permitted: bool = False) -> None:
    """Until the job has said something; a job that may not do what it tries ends with 77."""
    while text not in job.said():
        if not job.is_running():
            if permitted and job.wait() == [77]:
                pytest.skip(job.said().strip())
            pytest.fail(job.said())
        time.sleep(0.01)


# -- storage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    ["save:begin:eio@2", "save:write:enospc@90", "save:write:enospc@110", "save:fsync:eio@7", "save:rename:eio@2",
     "save:latest:enospc@2", "save:delete:eio@1"],
)  # fmt: skip
def test_a_failed_save_is_reported_and_training_goes_on(start, straight, tmp_path, fault):
    said = start(fault=fault).expect()
    assert re.search(r"warning   the checkpoint of step \d+ failed \(1 of 3\): .*; training goes on", said), said
    assert not differences(tmp_path / "run", straight[1])
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_three_failed_saves_in_a_row_end_the_run_and_the_last_good_one_continues(start, straight, tmp_path):
    said = start(fault="save:rename:enospc@2+").expect(6)
    assert "(2 of 3)" in said and "3 saves in a row failed; make room in" in said
    assert "continue with --resume from step 2" in said
    assert "resumed at step 2" in start("--resume").expect()
    assert not differences(tmp_path / "run", straight[1])


def test_the_last_save_must_succeed(start):
    assert "it was the last one" in start("--save-every", "100", fault="save:write:enospc@30").expect(6)


def run_and_make_room(filler: str, *argv: str) -> None:
    """In a process of a job: a command; the file goes when a save has failed."""
    from fastmim.cli import run
    from fastmim.saving import Saver

    wait = Saver.wait

    def wait_and_make_room(self, **how):
        wait(self, **how)
        if self.failures:
            Path(filler).unlink(missing_ok=True)

    Saver.wait = wait_and_make_room
    sys.exit(run(list(argv)))


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 40 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_gets_space_again(images, server, straight, disk):
    """A checkpoint takes 10 MiB. The filler goes after the first failed save."""
    (disk / "filler").write_bytes(bytes(34 << 20))
    argv = arguments(images, disk / "run", "--keep", "1")
    said = server.run(["--call", "test_faults", "run_and_make_room", str(disk / "filler"), *argv])
    assert "(1 of 3): [Errno 28]" in said and "(2 of 3)" not in said
    assert not differences(disk / "run", straight[1])


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing_at_the_start_is_one_line(images, server, disk, how):
    if how == "full":
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = server.run(arguments(images, disk / "run"), code=6)
    error = said[said.index("error: ") :]
    assert error.startswith(f"error: --out: expected a folder that can be written, got {disk / 'run'} (")
    assert error.count("\n") == 1 and "Traceback" not in said


def test_metrics_that_cannot_be_written_do_not_end_the_run(start, straight, tmp_path):
    said = start(fault="log:write:enospc@3-4").expect()
    assert said.count("metrics.jsonl: [Errno 28]") == 1
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, *range(5, 13)]


# -- other processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line(start, straight, tmp_path, victim):
    job = start(world=2, fault=f"step:backward:kill@5#{victim}")
    codes = job.wait(60)
    assert (codes[victim], codes[1 - victim]) == (-9, 7), job.said()
    assert f"error: rank {1 - victim}: another process of the run is gone" in job.said()
    assert "Traceback" not in job.said()
    # Rank 0 may have died before it had written the copy of step 4.
    assert re.search("resumed at step [24]", start("--resume", world=2).expect())
    assert not differences(tmp_path / "run", straight[2])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("step:forward:stop@4#1", r"waiting for rank 1 \(.+, process {pid}\), last seen at step \d, .*: its process does not run"),
        ("step:data:sleep=60@4#1", r"waiting for rank 1 \(.+, process {pid}\), last seen at step 3, waiting for data: its process "
                                   r"runs, but does not get on"),
        ("step:forward:stop@4#0", r"rank 0's host, which keeps the rendezvous, does not answer"),
    ],
)  # fmt: skip
def test_the_watchdog_names_the_rank_that_hangs(start, fault, words):
    job = start("--hang-after", "2", world=2, fault=fault)
    victim = int(fault[-1])
    end = time.monotonic() + 60
    while job.is_alive(1 - victim):
        assert time.monotonic() < end, "the other rank waits for ever"
        time.sleep(0.1)
    said = job.said()
    job.kill(victim)
    assert job.wait()[1 - victim] == 7, said
    assert re.search(words.format(pid=job.pids[victim]), said), said


def test_a_slow_rank_is_named(start, tmp_path):
    said = start("--log-every", "2", "--steps", "8", world=2, fault="step:data:sleep=0.5@1+#1").expect()
    # From the second time on: once may be chance.
    assert 1 <= len(re.findall(r"straggler rank 1: \d+ ms of data and forward per step", said)) <= 3, said
    assert [r.get("slowest_rank") for r in metrics(tmp_path / "run")].count(1) >= 2


def test_a_file_that_only_one_rank_misses_is_named_and_ends_all(images, server, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    argv = arguments(tmp_path / "images", tmp_path / "run", "--steps", "400")
    job = server.start(argv, world=2, FASTMIM_FAULT="step:data:sleep=0.05@1+#0")
    wait_for("step 3/", job)
    victim = tmp_path / "images" / "train" / "class1" / "005.jpg"
    victim.unlink()
    codes = job.wait(60)
    assert sorted(codes) == [4, 7], job.said()
    assert f"error: {victim}" in job.said()


# -- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "world"),
    [("save:write:term@5", 1), ("save:latest:usr1@1", 1), ("step:data:int@4", 1), ("step:backward:term@4#1", 2),
     ("step:forward:term@3#0,step:forward:term@3#1", 2), ("step:data:term@1", 1), ("step:forward:term@1#1", 2)],
)  # fmt: skip
def test_a_signal_at_any_moment_saves_on_all_ranks(start, straight, tmp_path, fault, world):
    start(world=world, fault=fault).expect(75)
    start("--resume", world=world).expect()
    assert not differences(tmp_path / "run", straight[world])


def test_a_signal_during_evaluation_saves_after_the_next_step(images, start):
    said = start("--val-data", str(images / "val"), fault="evaluate:term@1").expect(75)
    assert "stopped by signal at step 1" in said


def test_the_second_signal_ends_at_once(start):
    said = start(fault="step:forward:term@3,step:backward:term@3").expect(143)
    assert not re.search("step 3/|stopped by signal", said), said


# -- data workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda s: s.name)
def test_a_killed_worker_is_replaced_and_gives_the_same_images(start, straight, tmp_path, number):
    job = start("--workers", "1", fault=HELD)
    job.wait_until_held()
    (worker,) = psutil.Process(job.pids[0]).children()
    worker.send_signal(number)
    job.go_on()
    assert re.search(r"warning   rank 0, step \d+: data workers started again: .*", job.expect()), job.said()
    assert not differences(tmp_path / "run", straight[1])


def run_impatiently(*argv: str) -> None:
    """In a process of a job: a command whose data workers may be silent for 3 s instead of 5 minutes."""
    from fastmim_pipelines.loader import CropLoader

    from fastmim.cli import run

    CropLoader.__init__.__kwdefaults__["timeout_s"] = 3
    sys.exit(run(list(argv)))


def test_a_stopped_worker_is_replaced_and_gives_the_same_images(images, server, straight, tmp_path):
    """SIGSTOP, as of a worker that is stuck for good: it must be ended first."""
    argv = arguments(images, tmp_path / "run", "--workers", "1")
    call = ["--call", "test_faults", "run_impatiently", *argv]
    job = server.start(call, FASTMIM_FAULT=HELD)
    job.wait_until_held()
    (worker,) = psutil.Process(job.pids[0]).children()
    worker.send_signal(signal.SIGSTOP)
    job.go_on()
    assert re.search(r"data workers started again: .* got none; look whether .* the process was stopped", job.expect())
    assert not differences(tmp_path / "run", straight[1]) and not psutil.pid_exists(worker.pid)


def run_with_little_shared_memory(*argv: str) -> None:
    """In a process of a job: an impatient command in a mount namespace of its own with 512 KiB of /dev/shm."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursively_private = 0x20000, 0x4000 | 0x40000
    steps = (
        lambda: libc.unshare(new_namespace),
        lambda: libc.mount(None, b"/", None, recursively_private, None),
        lambda: libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=512k"),
    )
    for step in steps:
        if step():
            print(f"not permitted: {os.strerror(ctypes.get_errno())}", flush=True)
            sys.exit(77)
    run_impatiently(*argv)


def test_full_shared_memory_is_one_line_and_the_run_goes_on_when_there_is_room(images, server, straight, tmp_path):
    argv = arguments(images, tmp_path / "run", "--workers", "1", "--resume", "auto")
    call = ["--call", "test_faults", "run_with_little_shared_memory", *argv]
    job = server.start(call, FASTMIM_FAULT=f"{HELD},step:optimizer:sleep=0.2@1+")
    wait_for("step 4/", job, permitted=True)
    job.wait_until_held()
    # The job's own /dev/shm, seen from here. What a batch gives back is taken, too, or the next one would fit there.
    with open(f"/proc/{job.pids[0]}/root/dev/shm/filler", "wb", buffering=0) as filler:
        is_full = False
        while job.is_running():
            try:
                filler.write(bytes(4096))
            except OSError as e:
                assert e.errno == errno.ENOSPC
                if not is_full:
                    is_full = True
                    job.go_on()
                time.sleep(0.001)
    # A worker that cannot hand over its answer dies, or says so to nobody and is silent.
    assert "error: workers: expected at most 0 for the free space of /dev/shm, got 1" in job.expect(4)
    assert "resumed at step" in server.run(call)
    assert not differences(tmp_path / "run", straight[1])


# -- the run's folder and surroundings ---------------------------------------------------------------------------


def test_a_second_run_in_the_folder_names_the_first_which_a_kill_frees(start, straight, tmp_path):
    first = start("--workers", "1", fault=HELD)
    first.wait_until_held()
    assert f"is in use by process {first.pids[0]} on " in start("--resume").expect(2)
    first.kill(0, signal.SIGKILL)  # its worker lives on for a moment, and has the lock
    start("--resume").expect()
    assert not differences(tmp_path / "run", straight[1])


def test_of_two_runs_that_start_at_once_in_a_folder_one_is_refused(start, straight, tmp_path):
    jobs = [start(fault=HELD) for _ in range(2)]
    while all(job.is_running() for job in jobs):
        time.sleep(0.005)
    second, first = sorted(jobs, key=lambda job: job.is_running())
    said = second.expect(2)
    assert re.search(
        f"error: --out: {tmp_path / 'run'} (is in use by process {first.pids[0]} on |already holds a run; )", said
    )
    assert said.count("error: ") == 1
    first.wait_until_held()
    first.go_on()
    first.expect()
    assert not differences(tmp_path / "run", straight[1])


def test_odd_names_and_surroundings(images, server, straight, tmp_path):
    """No home, another language and time zone, a link for a run folder, file names that break lines and paths over 255."""
    deep = tmp_path / ("x" * 120) / ("ü" * 60) / "new\nline and 'quotes' \x1b[31m"
    shutil.copytree(images / "train", deep / "train")
    for i, path in enumerate(sorted((deep / "train").rglob("*.jpg"))):
        path.rename(path.with_name(path.stem + ("\nİ", "", " 日本")[i % 3] + ".jpg"))
    assert len(str(deep).encode()) > 255
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8",
           "TZ": "Asia/Kathmandu"}  # fmt: skip
    server.run(arguments(deep, tmp_path / "link" / "rün"), **env)
    assert not differences(tmp_path / "link" / "rün", straight[1])


def test_no_network_is_needed(images, straight, tmp_path):
    """In a network namespace with nothing but the loopback: no name can be looked up, nothing can be fetched."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    argv = [*alone, *command("python", 1, arguments(images, tmp_path / "run")[1:])]
    done = subprocess.run(argv, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not differences(tmp_path / "run", straight[1])


def test_weights_on_disk_are_what_they_were_in_memory(start, tmp_path):
    """The writer of safetensors files is our own: the library's reader must agree with it."""
    start().expect()
    folder = last_checkpoint(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    exported = load_file(tmp_path / "run" / "encoder.safetensors")
    assert all(weights[f"encoder.{name}"].equal(tensor) for name, tensor in exported.items())
    assert os.path.getsize(folder / "model.safetensors") > sum(t.nbytes for t in weights.values())
