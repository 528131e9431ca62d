"""Durations, exact counts, and the checks before a run."""

import dataclasses
import math

import pytest

from fastmim.arguments import parse_train
from fastmim.config import ConfigError, Duration, count_kept


@pytest.mark.parametrize(
    ("text", "steps"), [("40ep", 400), ("0.5ep", 5), ("500st", 500), ("500", 500), (500, 500), ("0st", 0)], ids=str
)
def test_duration_in_steps(text, steps):
    assert Duration.parse(text).steps(10) == steps


@pytest.mark.parametrize("text", ["", "ep", "-3st", "1.5st", "3 days", "1e3"])
def test_duration_refuses(text):
    with pytest.raises(ConfigError, match="--warmup: expected epochs"):
        Duration.parse(text, "--warmup")


@pytest.mark.parametrize(
    ("total", "ratio", "kept"),
    # The third is where floating point gives 0: 10 * (1 - 0.9) = 0.99999...
    [(196, 0.75, 49), (49, 0.65, 17), (10, 0.9, 1), (9, 0.75, 2), (64, 0.75, 16), (7, 0.0, 7), (100, 0.99, 1)],
)
def test_count_kept_is_exact(total, ratio, kept):
    assert count_kept(total, ratio) == kept


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1])
def test_count_kept_refuses_ratios_outside(ratio):
    with pytest.raises(ConfigError, match="expected 0 <= ratio < 1"):
        count_kept(196, ratio)


def test_count_kept_suggests_the_largest_ratio():
    with pytest.raises(ConfigError, match=r"keeps 0; take at most 0\.75") as error:
        count_kept(4, 0.8)
    assert count_kept(4, 0.75) == 1, error.value


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"image_size": 100, "patch_size": 8}, 1, "divisible by the patch size 8, got 100; take 96 or 104"),
        ({"image_size": (64, 60), "patch_size": 8}, 1, "width divisible by the patch size 8, got 60"),
        ({"batch_size": 100}, 3, "multiple of processes x --accumulate = 3 x 1, got 100; take 99 or 102"),
        ({"batch_size": 10, "accumulate": 4}, 1, "got 10; take 8 or 12"),
        ({"epochs": 1.0, "steps": 3}, 1, "expected one of them, got both"),
        ({"epochs": None}, 1, "expected one of them, got none"),
        ({"batch_size": 0}, 1, "--batch-size: expected at least 1, finite, got 0"),
        ({"keep": 0}, 1, "--keep: expected at least 1"),
        ({"lr": math.nan}, 1, "--lr: expected at least 0, finite, got nan"),
        ({"betas": (1.0, 2.0)}, 1, "--betas: expected a number in 0 .. 1, got 2"),
        ({"betas": (0.9, 1.0)}, 1, "--betas: expected numbers below 1"),
        ({"clip": 0.0}, 1, "--clip: expected a finite number above 0, got 0"),
        ({"workers": -1}, 1, "--workers: expected at least 0"),
        ({"seed": 10**400}, 1, "--seed: expected a number in 0 .. 9.2"),
        ({"in_chans": 0}, 1, "--in-chans: expected at least 1"),
        ({"warmup_start": -2.0}, 1, "--warmup-start: expected a number in 0 .. 1, got -2"),
        ({"in_chans": 5, "mean": (0.5,)}, 1, "--mean: expected 5 values"),
        ({"std": (1.0, 0.0, 1.0)}, 1, "--std: expected a finite number above 0, got 0"),
        ({"engine": "ddp", "zero": 1}, 1, "--zero 1: expected --engine zero or auto"),
        ({"engine": "single"}, 2, "--engine single: expected 1 process, got 2"),
        ({"save_every": "weekly"}, 1, "--save-every: expected epochs"),
        ({"resume": "last"}, 1, "--resume: expected nothing, a step number or auto"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_check_names_flag_value_and_fix(changes, world, words):
    config = dataclasses.replace(parse_train([]), **changes)
    with pytest.raises(ConfigError) as error:
        config.check(world)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_presets_pass_their_own_check(world):
    for argv in ([], ["--method", "mae"], ["--data", "d"], ["--data", "d", "--method", "mae", "--model", "vit_huge"]):
        config = parse_train(argv)
        config.check(world)
        assert config.batch_size % world == 0
