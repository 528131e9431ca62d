"""Learning rate against the published formula in fractional epochs, and the lengths that presets give."""

import dataclasses
import math

import pytest

from fastmim.config import ConfigError, Duration, TrainConfig
from fastmim.methods import cmae, mae
from fastmim.schedule import learning_rate

# 1,281,167 images at batch 4096.
STEPS_PER_EPOCH = 312


def published(step, *, steps_per_epoch, epochs, warmup_epochs, peak, start=0.0):
    """mae util/lr_sched.py with the epoch as a fraction and min_lr 0; `start` for CMAE's warm-up factor."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return start * peak + (peak - start * peak) * epoch / warmup_epochs
    return peak * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def of_preset(module, step):
    config = dataclasses.replace(TrainConfig(), **module.PRESETS["paper"].train)
    total = config.total_steps(STEPS_PER_EPOCH)
    warmup = Duration.parse(config.warmup).steps(STEPS_PER_EPOCH)
    return learning_rate(
        step, total=total, warmup=warmup, peak=config.peak_lr, warmup_start=config.warmup_start, end=config.lr_end,
        schedule=config.schedule,
    )  # fmt: skip


@pytest.mark.parametrize("module, epochs, start", [(mae, 800, 0.0), (cmae, 300, 1e-4)], ids=["mae", "cmae"])
def test_learning_rate_of_paper_preset_is_the_published_formula(module, epochs, start):
    total = epochs * STEPS_PER_EPOCH
    for step in [*range(0, total, 997), 1, 12479, 12480, 12481, total - 1]:
        expected = published(
            step, steps_per_epoch=STEPS_PER_EPOCH, epochs=epochs, warmup_epochs=40, peak=2.4e-3, start=start
        )
        assert of_preset(module, step) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_learning_rate_ends_of_the_paper_presets():
    assert of_preset(mae, 0) == 0
    assert of_preset(cmae, 0) == pytest.approx(2.4e-7, rel=1e-12)
    for module, epochs in ((mae, 800), (cmae, 300)):
        assert of_preset(module, 40 * STEPS_PER_EPOCH) == pytest.approx(2.4e-3, rel=1e-12)
        assert of_preset(module, 40 * STEPS_PER_EPOCH - 1) < 2.4e-3 > of_preset(module, 40 * STEPS_PER_EPOCH + 1)
        assert of_preset(module, epochs * STEPS_PER_EPOCH) == pytest.approx(0, abs=1e-15)
        assert of_preset(module, epochs * STEPS_PER_EPOCH - 1) > 0


@pytest.mark.parametrize("step, share", [(0, 0.0), (5, 0.5), (9, 0.9), (10, 1.0), (60, 0.5), (110, 0.0)])
def test_learning_rate_by_hand(step, share):
    """10 steps of warm-up, 100 of cosine: half of the peak half-way through each."""
    assert learning_rate(step, total=110, warmup=10, peak=3.0) == pytest.approx(3.0 * share, abs=1e-12)


def test_learning_rate_warmup_start_is_a_fraction_of_the_peak():
    rates = [learning_rate(step, total=20, warmup=4, peak=2.0, warmup_start=0.25) for step in range(5)]
    assert rates == pytest.approx([0.5, 0.875, 1.25, 1.625, 2.0])


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, total=10, warmup=0, peak=1.0) == 1.0


@pytest.mark.parametrize("total, warmup", [(5, 5), (5, 8), (1, 0)])
def test_learning_rate_of_runs_no_longer_than_their_warmup_is_defined(total, warmup):
    rates = [learning_rate(step, total=total, warmup=warmup, peak=1.0) for step in range(total)]
    assert all(0 <= rate <= 1 for rate in rates) and rates == sorted(rates)


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, total=200, warmup=30, peak=1.0) for step in range(201)]
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)
    assert max(rates) == rates[30] == 1.0


@pytest.mark.parametrize(
    "batch, base, peak", [(4096, 1.5e-4, 2.4e-3), (256, 1.5e-4, 1.5e-4), (1024, 5e-4, 2e-3), (64, 1e-3, 2.5e-4)]
)
def test_peak_lr_scales_with_the_batch_by_256(batch, base, peak):
    assert TrainConfig(batch_size=batch, base_lr=base).peak_lr == pytest.approx(peak, rel=1e-12)
    assert TrainConfig(batch_size=batch, base_lr=base, lr=0.3).peak_lr == 0.3


@pytest.mark.parametrize("text, steps", [("40ep", 12480), ("0.5ep", 156), ("500st", 500), ("7", 7), ("0st", 0)])
def test_duration_counts_epochs_or_steps(text, steps):
    assert Duration.parse(text).steps(STEPS_PER_EPOCH) == steps


@pytest.mark.parametrize("text", ["", "ep", "-3ep", "1.5st", "1.5", "4 epochs"])
def test_duration_refuses_what_it_cannot_read(text):
    with pytest.raises(ConfigError, match="warmup"):
        Duration.parse(text, "--warmup")


def test_learning_rate_cosine_may_end_above_zero():
    """CAE: from 1.5e-3 to 1e-5, by lr = end + (peak - end) (1 + cos) / 2."""
    for step in (20, 47, 80, 99, 100):
        expected = 1e-5 + (1.5e-3 - 1e-5) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert learning_rate(step, total=100, warmup=20, peak=1.5e-3, end=1 / 150) == pytest.approx(expected)
    assert learning_rate(100, total=100, warmup=20, peak=1.5e-3, end=1 / 150) == pytest.approx(1e-5)


def test_learning_rate_of_the_step_schedule_falls_once():
    rates = [
        learning_rate(epoch, total=800, warmup=10, peak=4e-4, schedule="step") for epoch in (10, 400, 699, 700, 799)
    ]
    assert rates == pytest.approx([4e-4, 4e-4, 4e-4, 4e-5, 4e-5])
