"""Worker processes against signals, a killed parent and full shared memory; each scene in its own process group."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fastmim_pipelines import CropSpec, cores, open_files, workers
from fastmim_pipelines.decode import CropReader
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.native_decode import FileSpan
from fastmim_pipelines.pack import pack
from fastmim_pipelines.spec import DataError

SCENE = """
import multiprocessing, os, signal, sys
from fastmim_pipelines import CropSpec
from fastmim_pipelines.folder import FolderLoader

seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: seen.append(number))
loader = FolderLoader(sys.argv[1], (CropSpec((16, 16)),), batch_size=4, workers=2)
batches = loader.epoch(0)
if "early" not in sys.argv:
    next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def scene(demo_set, request):
    """Starts SCENE plus more lines; gives the process and the ids of its workers."""

    def start(more: str, *flags: str) -> tuple[subprocess.Popen, list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCENE + more, str(demo_set / "train"), *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        request.addfinalizer(process.kill)
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2, process.stderr.read()
        return process, pids

    return start


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone_within(seconds: float, pids: list[int]) -> None:
    began = time.monotonic()
    while any(map(is_running, pids)):
        assert time.monotonic() - began < seconds, "workers still run"
        time.sleep(0.05)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
@pytest.mark.parametrize(("moment", "batches_left"), [("early", 15), ("later", 14)])
def test_workers_outlive_signals_to_the_whole_group(scene, moment, batches_left):
    process, pids = scene(
        """
rest = list(batches)
loader.close()
print(len(rest), sorted(seen), multiprocessing.active_children())
""",
        moment,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.killpg(process.pid, number)
    time.sleep(0.3)
    assert all(map(is_running, pids))
    out, err = process.communicate("\n", timeout=60)
    assert out.split("\n")[0] == f"{batches_left} [2, 10, 15] []", err
    assert process.returncode == 0


@linux_only
@pytest.mark.parametrize("moment", ["early", "later"])
def test_workers_end_with_a_killed_trainer(scene, moment):
    process, pids = scene("", moment)
    process.kill()
    assert_gone_within(60, pids)


@linux_only
def test_workers_end_with_a_trainer_that_forgot_to_close(scene):
    process, pids = scene("sys.exit(5)")
    _, err = process.communicate("\n", timeout=60)
    assert process.returncode == 5 and "Traceback" not in err
    assert_gone_within(60, pids)


@linux_only
def test_a_killed_worker_is_reported(scene):
    process, pids = scene("""
try:
    print("running", flush=True)
    for epoch in range(1000):
        for batch in loader.epoch(epoch, 1 if epoch == 0 else 0):
            pass
except RuntimeError as e:
    print(e)
print(multiprocessing.active_children())
""")
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    os.kill(pids[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    # Who notices first: torch's handler of SIGCHLD, its look at a silent queue, or we at a broken connection.
    told = ("is killed by signal", "exited unexpectedly", "a worker was killed")
    assert any(text in out for text in told) and out.endswith("[]\n"), (out, err)


def test_shared_memory_is_checked_before_the_start(monkeypatch):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 << 20}))
    assert workers.most_workers(10 << 20) == 2 and workers.most_workers(40 << 20) == 0
    with pytest.raises(DataError, match=r"workers: expected at most 0 .*, got 2; use that, or .* --shm-size=\d+m"):
        workers.Answers([], [], workers=2, result_bytes=40 << 20)


def test_cores_and_default_workers(monkeypatch):
    assert 1 <= cores.available_cores() <= (os.cpu_count() or 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for available, world, on_cpu, expected in (
        (16, 1, False, 16),
        (64, 1, False, 16),
        (2, 1, True, 1),
        (2, 2, True, 1),
        (8, 2, True, 3),
        (1, 8, False, 1),
    ):
        monkeypatch.setattr(cores, "available_cores", lambda available=available: available)
        assert cores.default_workers(world, trains_on_cpu=on_cpu) == expected
    monkeypatch.setattr(cores, "available_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores.default_workers(32, trains_on_cpu=False) == 4


# -- what does not answer ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(workers, "_SILENCE_S", 0.3)
    monkeypatch.setattr(workers, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(open_files, "_PATIENCE_S", 0.5)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize("options", [{"threads": 2}, {"workers": 1}], ids=str)
def test_a_file_system_that_hangs_is_told_with_the_file(
    demo_set, tmp_path, monkeypatch, impatient, options, packed, children
):
    data = demo_set / "train"
    if packed:
        pack(FolderIndex(data), tmp_path / "tar", to="tar", shard_bytes=1 << 17, workers=0, progress=lambda line: None)
        data = tmp_path / "tar"
    index, released = open_index(data), threading.Event()
    victim = index.encoded([7])[0]
    victim = victim if isinstance(victim, str) else victim.path
    read, touch = CropReader.read, open_files._touch

    def hang(images) -> None:
        if any((image if isinstance(image, str) else image.path) == victim for image in images):
            released.wait(60)

    monkeypatch.setattr(CropReader, "read", lambda self, images, *rest: (hang(images), read(self, images, *rest))[1])
    monkeypatch.setattr(open_files, "_touch", lambda image: (hang([image]), touch(image)))
    loader = FolderLoader(index, (CropSpec((16, 16)),), batch_size=4, **options)
    with pytest.raises(
        DataError, match=r"expected an answer of its file system, got none, after .* s without a batch"
    ) as e:
        for _ in loader.epoch(0):
            pass
    # Found out while it hangs: a worker's own hang ends after a minute, and is no error then.
    assert e.value.path == victim and e.value.exit_code == 4
    released.set()
    assert children() == []


@linux_only
def test_a_worker_that_is_stopped_is_told_and_ended(demo_set, impatient, children):
    loader = FolderLoader(demo_set / "train", (CropSpec((16, 16)),), batch_size=4, workers=1)
    batches = loader.epoch(0)
    next(batches)
    loader._answers._watch._timeout_s = 1  # from here on: a slow machine may need longer for its first answer
    (worker,) = children()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"data workers: expected an answer within 1 s, got none.*was stopped"):
        for _ in batches:
            pass
    assert not is_running(worker.pid)


def test_a_slow_answer_is_waited_for(demo_set, impatient, monkeypatch):
    """Silence alone is no reason to end a run, as long as the files answer."""
    monkeypatch.setattr(open_files, "_PATIENCE_S", 10)
    read = CropReader.read
    monkeypatch.setattr(CropReader, "read", lambda self, *a: (time.sleep(0.8), read(self, *a))[1])
    for options in ({"threads": 1}, {"workers": 1}):
        loader = FolderLoader(demo_set / "train", (CropSpec((16, 16)),), batch_size=20, **options)
        assert len(list(loader.epoch(0))) == 3
        loader.close()


def test_what_cannot_be_read_is_no_hang(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    os.mkfifo(tmp_path / "pipe")
    images = [str(tmp_path / name) for name in ("a", "gone", "pipe", ".")]
    assert open_files.first_without_answer(lambda: [*images, b"", FileSpan(images[0], 99, 5)]) is None
