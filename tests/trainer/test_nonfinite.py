"""Gradients that are not finite: skipped on every rank by every engine, counted across resumes, captured, replayed."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from storm import last_checkpoint
from trainer_run import TINY, metrics, write_images

from fastmim import checkpoint
from fastmim.nonfinite import WINDOW_STEPS, Skips
from fastmim.replay import micro_rows

STEPS, LR = 8, 2e-5
ENGINES = [(1, []), (2, []), (2, ["--zero", "0"]), (2, ["--zero", "1"]), (2, ["--zero", "2"]), (2, ["--zero", "3"]),
           (2, ["--zero", "3", "--zero-offload", "all"]), (1, ["--zero", "2", "--zero-offload", "optimizer"])]  # fmt: skip


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    return ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--mae.decoder-width", "32", "--steps",
            str(STEPS), "--save-every", "2", "--out", str(out), *extra]  # fmt: skip


def capture_of(said: str) -> Path:
    """The folder that a run left for `fastmim replay`."""
    return Path(re.search(r"`fastmim replay (.+?)`", said)[1])


def manifest(out: Path) -> dict:
    return checkpoint.verify(last_checkpoint(out))


def flat(out: Path, name: str) -> torch.Tensor:
    """All tensors of a file, in the order of their names."""
    tensors = load_file(last_checkpoint(out) / name)
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


@pytest.fixture(scope="module")
def skipped_once(images, server, tmp_path_factory) -> Path:
    """One plain process that skips step 3."""
    out = tmp_path_factory.mktemp("skipped") / "run"
    server.run(arguments(images, out), FASTMIM_FAULT="step:backward:nan@4")
    return out


@pytest.mark.parametrize(
    ("world", "flags"),
    ENGINES,
    ids=lambda v: "_".join(v).replace("--", "") or "plain" if isinstance(v, list) else str(v),
)
def test_nan_in_one_ranks_gradient_skips_the_step_on_all(images, server, skipped_once, tmp_path, world, flags):
    """The result is that of the plain process: neither weights, nor moments, nor Adam's step count have seen the step."""
    out = tmp_path / "run"
    fault = f"step:backward:nan@4#{world - 1}"
    said = server.run(arguments(images, out, *flags), world=world, FASTMIM_FAULT=fault)
    assert "warning   step 3: the gradient was not finite; no weight was touched by it" in said
    assert [r["skipped_steps"] for r in metrics(out)] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert manifest(out)["meta"]["state"]["skipped_steps"] == [3]
    # One step moves each of the n weights by the learning rate: the difference must be far below that. (It is not nothing:
    # where the gradient is zero but for rounding, as for the bias of keys, Adam steps by the sign of the rounding.)
    ours, theirs = flat(out, "model.safetensors"), flat(skipped_once, "model.safetensors")
    assert ours.isfinite().all()
    assert float((ours - theirs).norm()) < 0.05 * LR * math.sqrt(len(theirs))
    ours, theirs = flat(out, "optimizer.safetensors"), flat(skipped_once, "optimizer.safetensors")
    assert float((ours - theirs).norm()) < 1e-5 * float(theirs.norm())
    steps = [float(t) for n, t in load_file(last_checkpoint(out) / "optimizer.safetensors").items() if "step." in n]
    assert set(steps) == {STEPS - 1.0}


def test_inf_in_the_loss_is_skipped_too(images, server, skipped_once, tmp_path):
    out = tmp_path / "run"
    server.run(arguments(images, out), FASTMIM_FAULT="step:forward:inf@4")
    ours, theirs = (load_file(last_checkpoint(o) / "model.safetensors") for o in (out, skipped_once))
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_the_budget_outlives_a_resume_and_its_end_leaves_a_capture(images, server, tmp_path):
    argv = [*arguments(images, tmp_path / "run"), "--skip-budget", "2"]
    server.run(argv, code=75, FASTMIM_FAULT="step:backward:nan@2-3,step:update:term@5")
    said = server.run([*argv, "--resume"], code=5, FASTMIM_FAULT="step:backward:nan@2")
    assert "3 of the last 1000 steps were skipped" in said and "more than --skip-budget 2" in said
    capture = capture_of(said)
    meta = checkpoint.verify(capture)["meta"]
    assert meta["grad_norm"] == "nan" and math.isfinite(float(meta["losses"][0])) and len(meta["ids"]) == 8
    assert meta["skipped_steps"][:2] == [1, 2]
    # What went wrong here was no function of weights and images, and the replay says so.
    said = server.run(["replay", str(capture)], code=1)
    assert "not reproduced" in said and f"loss      {meta['losses'][0]}; in the run {meta['losses'][0]}" in said


@pytest.mark.parametrize(("world", "flags"), [(1, []), (2, ["--accumulate", "2"]), (2, ["--zero", "3"])])
def test_a_replay_gives_the_same_tensor_that_is_not_finite(images, server, tmp_path, world, flags):
    """A learning rate that blows the weights up: from the weights in the capture, the step is not finite again."""
    argv = arguments(images, tmp_path / "run", "--steps", "60", "--lr", "1e25", *flags)
    capture = capture_of(server.run(argv, world=world, code=5))
    weights = load_file(capture / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    said = [server.run(["replay", str(capture)]) for _ in range(2)]
    assert said[0] == said[1]
    assert "done      reproduced" in said[0]
    first = re.search(
        r"forward   \d+ not finite; first: (\S+): (\d+) of (\d+) numbers \(SHA-256 [0-9a-f]{16}\)", said[0]
    )
    assert first and 0 < int(first[2]) <= int(first[3])


def test_capture_of_other_data_is_refused(images, server, tmp_path):
    argv = arguments(images, tmp_path / "run", "--skip-budget", "0")
    capture = capture_of(server.run(argv, code=5, FASTMIM_FAULT="step:forward:nan@6"))
    body = json.loads((capture / checkpoint.MANIFEST).read_text())["manifest"]
    body["meta"]["config"]["data"] = str(write_images(tmp_path / "other", 20))
    (capture / checkpoint.MANIFEST).write_text(checkpoint._manifest_text(body))
    assert "expected the images of the run in" in server.run(["replay", str(capture)], code=2)


def test_skips_leave_the_window():
    skips = Skips(budget=1)
    for step in (0, 10, WINDOW_STEPS + 5):
        skips.note(step, torch.tensor(False))
        assert skips.settle() == step and skips.settle() is None
    assert list(skips.steps) == [10, WINDOW_STEPS + 5] and skips.is_spent
    skips.note(2 * WINDOW_STEPS, torch.tensor(True))
    assert skips.settle() is None and list(skips.steps) == [WINDOW_STEPS + 5] and not skips.is_spent


def test_rows_of_a_replayed_micro_batch_are_those_of_all_ranks():
    # 2 ranks with 4 images each, in 2 micro-batches: ranks have 0..3 and 4..7.
    assert micro_rows(8, 2, 2) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert micro_rows(6, 1, 3) == [[0, 1], [2, 3], [4, 5]]


def test_the_budget_of_bad_images_outlives_a_resume(server, tmp_path):
    """One bad image of 12 in every epoch; the eleventh is one too many, whether the run was interrupted or not."""
    data = write_images(tmp_path / "images", 4)
    victim = data / "class1" / "002.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    argv = ["train", "--method", "mae", "--data", str(data), *TINY, "--batch-size", "4", "--mae.decoder-width", "32",
            "--steps", "60", "--on-bad-image", "skip"]  # fmt: skip
    assert "11 of " in server.run([*argv, "--out", str(tmp_path / "a")], code=4)
    argv += ["--out", str(tmp_path / "b")]
    server.run(argv, code=75, FASTMIM_FAULT="step:optimizer:term@14")
    assert "11 of " in server.run([*argv, "--resume"], code=4)
    assert [r["step"] for r in metrics(tmp_path / "b")] == [r["step"] for r in metrics(tmp_path / "a")]
