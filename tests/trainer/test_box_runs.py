"""Whole runs whose boxes change in the middle, stopped anywhere.

36 images in batches of 8, 4 steps per epoch; box updates at steps 4, 8 and 12 of 16.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from storm import differences
from trainer_run import TINY, metrics

from fastmim import boxes
from fastmim.arguments import parse_train
from fastmim.boxes import HeatBoxes
from fastmim.methods.icmae import ICMAE
from fastmim.session import Session

WHOLE = [0.0, 0.0, 1.0, 1.0]


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    small = ["--icmae.head-hidden", "32", "--icmae.head-out", "16", "--icmae.decoder-width", "32"]
    return ["--method", "icmae", "--data", str(images / "train"), *TINY, "--lr", "2e-3", *small, "--steps", "16",
            "--save-every", "1", "--keep", "99", "--out", str(out), *extra]  # fmt: skip


def run(images: Path, out: Path, *extra: str) -> None:
    assert Session(parse_train(arguments(images, out, *extra))).run()


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:07d}"


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory) -> Path:
    """The run that nobody interrupts."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(images, out)
    return out


def test_run_updates_its_boxes_and_logs_their_area(straight):
    areas = [record["box_area"] for record in metrics(straight) if "loss" in record]
    assert len(areas) == 16
    assert areas[:4] == [0.25] * 4, "the middle of the image first"
    for epoch in range(4):
        assert len(set(areas[4 * epoch : 4 * epoch + 4])) == 1, "boxes change at the starts of epochs"
    assert len(set(areas)) == 4


def test_checkpoints_hold_the_boxes_of_their_step(straight):
    held = {}
    for step in range(1, 17):
        manifest = json.loads((checkpoint(straight, step) / "manifest.json").read_text())["manifest"]
        assert ("boxes.safetensors" in manifest["files"]) == (step > 4)
        if step > 4:
            held[step] = load_file(checkpoint(straight, step) / "boxes.safetensors")["boxes"]
            assert held[step].shape == (36, 4) and held[step].dtype == torch.float32
    # A checkpoint at an update's step was written before the update.
    changes = [step for step in range(6, 17) if not torch.equal(held[step], held[step - 1])]
    assert changes == [9, 13]
    areas = {record["step"]: record["box_area"] for record in metrics(straight) if "loss" in record}
    for step, found in held.items():
        assert boxes.area(found).mean().item() == pytest.approx(areas[step], rel=1e-6)


@pytest.mark.parametrize("step", [3, 8, 10], ids=["before", "at", "after"])
def test_resume_around_an_update_is_bit_equal(images, straight, tmp_path, step):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    run(images, out, "--resume", str(step))
    assert not differences(out, straight)


def test_resume_with_other_boxes_is_another_run(images, straight, tmp_path):
    """The case can tell: after a resume at step 10 the next update is two steps away, so the file's boxes matter."""
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    state, real = SimpleNamespace(), HeatBoxes.load

    def load(self, folder):
        real(self, folder)
        state.found = self.found
        self.found = np.tile(np.float32(WHOLE), (36, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeatBoxes, "load", load)
        run(images, out, "--resume", "10")
    assert state.found is not None
    ours, theirs = (load_file(checkpoint(folder, 12) / "model.safetensors") for folder in (out, straight))
    assert any(not ours[key].equal(theirs[key]) for key in ours)


def test_damaged_boxes_make_the_checkpoint_invalid(images, straight, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    victim = checkpoint(out, 16) / "boxes.safetensors"
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    run(images, out, "--resume")
    said = capsys.readouterr().out
    assert f"checkpoint passed over: {victim}: its SHA-256 does not match" in said and "resumed at step 15" in said
    assert not differences(out, straight)


def test_a_run_that_dies_within_an_update_goes_on_bit_equal(images, straight, tmp_path, monkeypatch):
    """Saving every 3 steps, the newest checkpoint is of step 6, or 3, when the run dies at 8: before the update."""
    out, extra = tmp_path / "run", ["--save-every", "3"]
    state, update, heat_map = SimpleNamespace(), HeatBoxes._update, ICMAE.heat_map

    def begins(self, step):
        state.step = step
        update(self, step)

    def dies_at_the_second(self, images):
        heat = heat_map(self, images)
        if state.step == 8:
            raise MemoryError("the second update")
        return heat

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(HeatBoxes, "_update", begins)
        patch.setattr(ICMAE, "heat_map", dies_at_the_second)
        run(images, out, *extra)
    assert not checkpoint(out, 9).exists()
    run(images, out, *extra, "--resume")
    assert not differences(out, straight)


@pytest.mark.parametrize("step", [2, 3, 6], ids=["before", "skipped just before", "after"])
def test_a_skipped_step_is_replayed_with_its_boxes(images, server, tmp_path, step):
    """The loss says so, to the last digit: it is that of these crops alone. (Step 3's is kept after the update at step 4.)"""
    flags = ("--skip-budget", "0", "--save-every", "16")
    argv = ["train", *arguments(images, tmp_path / "run", *flags)]
    said = server.run(argv, code=5, FASTMIM_FAULT=f"step:backward:nan@{step + 1}")
    capture = Path(re.search(r"`fastmim replay (.+?)`", said)[1])
    assert capture.name.endswith(str(step)) and (capture / boxes.BOXES_FILE).exists()
    assert (boxes.area(torch.from_numpy(boxes.read_boxes(capture))).mean().item() == 0.25) == (step < 4)
    (loss,) = json.loads((capture / "manifest.json").read_text())["manifest"]["meta"]["losses"]
    assert f"loss      {loss}; in the run {loss}" in server.run(["replay", str(capture)], code=1)


def test_random_crops_need_no_boxes(images, tmp_path):
    run(images, tmp_path / "run", "--icmae.crop", "random", "--steps", "5", "--save-every", "5")
    assert not any("box_area" in record for record in metrics(tmp_path / "run"))
    assert not (checkpoint(tmp_path / "run", 5) / "boxes.safetensors").exists()


def test_centered_crops_are_never_updated(images, tmp_path):
    run(images, tmp_path / "run", "--icmae.crop", "sim_center", "--save-every", "16")
    assert {r["box_area"] for r in metrics(tmp_path / "run") if "loss" in r} == {0.25}
    assert not (checkpoint(tmp_path / "run", 16) / "boxes.safetensors").exists()


def test_synthetic_images_have_no_boxes(tmp_path):
    out = tmp_path / "run"
    assert Session(
        parse_train(["--method", "icmae", "--loader", "synthetic", *TINY, "--steps", "2", "--out", str(out)])
    ).run()
    assert len([r for r in metrics(out) if "loss" in r]) == 2


def test_two_processes_find_the_same_boxes(images, server, tmp_path):
    """DDP over two ranks, each with half of the images. At a small rate the weights stay so close, up to the rounding of the
    averaged gradients, that no cell of a heat map crosses its threshold; the boxes move all the same."""
    small = ("--lr", "1e-5", "--save-every", "16")
    run(images, tmp_path / "one", *small)
    server.run(["train", *arguments(images, tmp_path / "two", *small)], world=2)
    ours, theirs = ([r["box_area"] for r in metrics(tmp_path / out) if "loss" in r] for out in ("two", "one"))
    assert ours[:4] == [0.25] * 4 and ours[4] != 0.25
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_noise_beside_real_images_has_no_boxes(images, tmp_path):
    """`--loader synthetic` pretends another number of images than --data has."""
    run(images, tmp_path / "run", "--loader", "synthetic")
    assert all("box_area" not in record for record in metrics(tmp_path / "run"))
