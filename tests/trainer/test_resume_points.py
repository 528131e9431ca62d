"""Every method goes on from any point of a run as if nothing had happened, with any number of processes, bit for bit."""

import hashlib
import shutil

import pytest
import torch
from storm import differences
from trainer_run import TINY

from fastmim.arguments import parse_train
from fastmim.masking import RandomPolicy
from fastmim.methods.base import available

# 36 images, batch 8: 4 steps per epoch. Every step has two micro-batches; the first six warm up.
STEPS = 10
POINTS = {
    "first step": 1,
    "last of an epoch": 3,
    "first of an epoch": 4,
    "within the warm-up": 5,
    "middle": 7,
    "late": 9,
}
CASES = [
    ("cae", "first step", 1),
    ("cmae", "last of an epoch", 2),
    ("icmae", "within the warm-up", 2),  # one step after its boxes moved
    ("mae", "first of an epoch", 4),  # ZeRO-2: DDP arranges its buffers anew after the first step of a process
    ("mixedae", "middle", 1),
    ("simmim", "late", 2),
]


def test_all_methods_and_points_are_here():
    assert [method for method, _, _ in CASES] == sorted(available()) and {point for _, point, _ in CASES} == {*POINTS}


@pytest.mark.parametrize(("method", "point", "world"), CASES)
def test_a_run_goes_on_from_any_point(images, server, tmp_path, method, point, world):
    """The finished run's folder, gone back to a step: what is computed again must be what was there."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    argv = ["train", "--method", method, "--data", str(images / "train"), *TINY, "--steps", str(STEPS), "--warmup", "6",
            "--accumulate", "2", "--save-every", "1", "--keep", "99", *(["--zero", "2"] if world > 2 else [])]  # fmt: skip
    server.run([*argv, "--out", str(straight)], world=world)
    shutil.copytree(straight, out)
    argv += ["--out", str(out), "--resume", str(POINTS[point])]
    assert f"resumed at step {POINTS[point]} of {STEPS}" in server.run(argv, world=world)
    assert len(list((out / "checkpoints" / "abandoned").iterdir())) == STEPS - POINTS[point]
    assert not differences(out, straight)


def test_no_mask_comes_twice():
    """A resumed run whose randomness began anew would show the masks of its first steps again: 10,000 are all others."""
    config = parse_train(["--method", "mae", "--data", "."])
    policy, seen = RandomPolicy(config.model_spec(), 0.75), set()
    for step in range(100):
        plan = policy(torch.tensor([config.seed, step]), torch.arange(100))
        seen |= {hashlib.sha256(row.numpy().tobytes()).digest() for row in plan.mask.to(torch.uint8)}
    assert len(seen) == 10_000
    again = policy(torch.tensor([config.seed, 7]), torch.arange(100))
    assert {hashlib.sha256(row.numpy().tobytes()).digest() for row in again.mask.to(torch.uint8)} <= seen
