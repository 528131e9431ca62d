"""Two processes compute what one computes with the same global batch, for every method."""

from itertools import pairwise

import pytest
from trainer_run import TINY, losses, train

from fastmim.methods.base import available

STEPS = 20


@pytest.mark.parametrize("method", available())
def test_losses_of_two_ranks_are_those_of_one(images, tmp_path, method):
    """fp32, from the first step to the last; 20 steps are 5 epochs here, and ICMAE finds new boxes in four of them."""
    # Without labels nothing is evaluated: this is about training.
    common = ["--method", method, "--data", str(images / "train"), *TINY, "--steps", str(STEPS)]
    curves = []
    for launcher, ranks in (("python", 1), ("torchrun", 2)):
        out = tmp_path / f"ranks-{ranks}"
        done = train([*common, "--out", str(out)], launcher, ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        curves.append(losses(out))
    assert len(curves[0]) == STEPS
    assert all(a != b for a, b in pairwise(curves[0])), "a run that stands still would agree with itself"
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
