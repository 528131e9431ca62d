"""Ways of the step benchmark in processes of their own."""

import importlib
import multiprocessing
import os
import sys
import time
from dataclasses import replace

import pytest
from trainer_run import ROOT


@pytest.fixture
def bench(monkeypatch):
    """name -> module of the bench folder."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    yield importlib.import_module
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


class Absent:
    """A way that cannot be."""

    needs = ""

    def __init__(self, case):
        raise ImportError(f"no package for {case}")


class Missing:
    """A way of a package that is not there."""

    needs = "no_such_package"


class Dying:
    """A way whose process ends."""

    needs = ""

    def __init__(self, case):
        os._exit(3)


def test_a_way_apart_is_the_way_here(bench):
    """The same losses and counts, time that is its own, and an end."""
    step, turns = bench("bench_step"), bench("turns")
    options = bench("providers").Ours, step.make_case("simmim", "vit_pico", 32, 8, 2, "fp32"), 3
    here, apart = (place(*options) for place in (turns.Here, turns.Apart))
    assert apart.facts.losses == pytest.approx(here.facts.losses, rel=1e-6) and len(set(here.facts.losses)) == 3
    assert replace(apart.facts, losses=[], first_step_s=0.0) == replace(here.facts, losses=[], first_step_s=0.0)
    before = time.process_time()
    seconds = [apart.turn() for _ in range(20)]
    assert time.process_time() - before < sum(seconds), "the step is taken there, and its time is that process's"
    assert apart.counted() == here.counted()
    assert (step.processes(apart), step.processes(here)) == ("one for each way", "one for all ways")
    apart.close()
    assert not multiprocessing.active_children()


def test_a_turn_takes_as_many_short_steps_as_fill_it(bench, monkeypatch):
    step, turns = bench("bench_step"), bench("turns")
    here = turns.Here(bench("providers").Ours, step.make_case("simmim", "vit_pico", 32, 8, 2, "fp32"), 1)
    times, taken = iter(range(1000)), []
    monkeypatch.setattr(here.way, "step", lambda: taken.append(1))
    monkeypatch.setattr(turns, "clock", lambda: 0.03 * next(times))
    assert here.turn() == pytest.approx(0.03) and len(taken) == 7, "the first to pass 0.2 s is the last"
    monkeypatch.setattr(turns, "LEAST_TURN_S", 0.0)
    assert here.turn() == pytest.approx(0.03) and len(taken) == 8


@pytest.mark.parametrize(
    "kind, error, message",
    [
        (Absent, LookupError, "no package for"),
        (Missing, LookupError, "no_such_package is not installed"),
        (Dying, RuntimeError, "exit code 3"),
    ],
)
def test_a_way_apart_that_cannot_start_says_why(bench, kind, error, message):
    with pytest.raises(error, match=message):
        bench("turns").Apart(kind, {}, 1)
    assert not multiprocessing.active_children()
