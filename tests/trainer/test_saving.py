"""Checkpoints that are written while training goes on: one at a time, out of one copy, however slow the disk is."""

import threading

from safetensors.torch import load_file
from trainer_run import TINY

from fastmim.arguments import parse_train
from fastmim.saving import HostCopy, Saver
from fastmim.session import Session

STEPS = 5


def run(images, out) -> None:
    """A checkpoint at every step."""
    flags = [
        "--method",
        "mae",
        "--data",
        str(images / "train"),
        *TINY,
        "--mae.decoder-width",
        "32",
        "--save-every",
        "1",
    ]
    assert Session(parse_train([*flags, "--keep", "99", "--steps", str(STEPS), "--out", str(out)])).run()


def test_a_save_waits_for_the_one_before_and_uses_its_memory(images, tmp_path, monkeypatch):
    """On a disk so slow that no save is done when the next one is due: each begins to write only then."""
    run(images, tmp_path / "quick")
    is_due, writing, written, buffers = threading.Event(), [], [], []
    put, wait, write = HostCopy.put, Saver.wait, Saver._write

    def put_watched(self, file, name, tensor):
        assert not writing, "the copy that is being written was changed"
        put(self, file, name, tensor)

    def wait_until_due(self, **how):
        is_due.set()
        wait(self, **how)
        is_due.clear()
        buffers.append({(f, n): t.data_ptr() for f, tensors in self.copy.files.items() for n, t in tensors.items()})

    def write_when_due(self, temporary, step, meta):
        writing.append(step)
        assert is_due.wait(60) and writing == [step]
        assert [thread.name for thread in threading.enumerate()].count("checkpoint") == 1
        write(self, temporary, step, meta)
        written.append(writing.pop())

    monkeypatch.setattr(HostCopy, "put", put_watched)
    monkeypatch.setattr(Saver, "wait", wait_until_due)
    monkeypatch.setattr(Saver, "_write", write_when_due)
    run(images, tmp_path / "slow")
    assert written == [1, 2, 3, 4, 5]
    # Nothing was copied before the first wait; then the same memory each time.
    assert not buffers[0] and buffers[1] and buffers[1:] == [buffers[1]] * STEPS
    for step in range(1, STEPS + 1):
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (
                load_file(tmp_path / r / "checkpoints" / f"step-{step:07d}" / name) for r in ("slow", "quick")
            )
            assert ours and all(ours[key].equal(theirs[key]) for key in ours | theirs)
