"""`--batch-size auto`: the largest batch that fits, on one rank and agreed on by all, and a number from then on."""

import json
import math
import re

import pytest
import torch
import yaml
from trainer_run import TINY, losses

from fastmim import autobatch, compiling, memory
from fastmim.arguments import parse_train
from fastmim.autobatch import Found, find_batch, largest, resolve
from fastmim.cli import run
from fastmim.config import ConfigError
from fastmim.engine.base import Choice

CPU = torch.device("cpu")
SMALL = ["--method", "mae", "--model", "vit_pico", "--mae.decoder-width", "32", "--mae.decoder-depth", "1"]


class Limit:
    """Fits up to a number; keeps what was asked."""

    def __init__(self, limit: int):
        self.limit, self.tried = limit, []

    def __call__(self, images: int) -> bool:
        self.tried.append(images)
        return images <= self.limit


@pytest.mark.parametrize("unit", [1, 3, 8])
def test_search_finds_the_last_that_fits_in_few_tries(unit):
    for most in (0, 1, 7, 8, 64, 100):
        for limit in (0, 1, 7, 8, 9, 63, 64, 65, 99, 1000):
            fits = Limit(limit)
            assert largest(fits, unit, most) == min(limit, most) // unit * unit
            assert len(fits.tried) == len(set(fits.tried)) <= 2 * math.log2(max(2, most)) + 2
            assert all(0 < images <= most for images in fits.tried)


def config_of(*arguments: str):
    return parse_train(
        [*SMALL, "--precision", "fp32", "--batch-size", "auto", *TINY, "--batch-size", "auto", *arguments]
    )


def test_computed_batch_is_the_last_whose_step_fits(monkeypatch):
    """Against a trace of whole steps of that size, and of one unit more."""
    config = config_of()
    with torch.device("meta"):
        parameters = sum(
            p.numel() for p in autobatch.methods.build("mae", config.model_spec(), config.options, 0).parameters()
        )
    given = 16 * parameters + (24 << 20)
    monkeypatch.setattr(autobatch, "host_bytes", lambda: given / autobatch.SHARE)
    found = find_batch(config, config.model_spec(), CPU, Choice("single", 0, "none", ""), 1, 10_000)

    def total(images: int) -> float:
        step = memory.trace_step(
            "mae", config.model_spec(), config.options, images, low_precision=False, gradient_share=0.0
        )
        return 16 * parameters + step.peak + 2 * 3 * 16 * 16 * images

    assert found.images % autobatch.UNIT == 0 and found.images >= 2 * autobatch.UNIT
    assert total(found.images) <= given < total(found.images + autobatch.UNIT)
    again = config_of("--checkpointing", "blocks")
    assert find_batch(again, config.model_spec(), CPU, Choice("single", 0, "none", ""), 1, 10_000).images > found.images


def test_groups_and_the_data_bound_the_batch(monkeypatch):
    monkeypatch.setattr(autobatch, "host_bytes", lambda: 1e15)
    config = config_of()
    choice = Choice("single", 0, "none", "")
    for multiple, most, images in ((1, 36, 32), (3, 100, 96), (4, 7, 4), (1, 5, 5)):
        assert find_batch(config, config.model_spec(), CPU, choice, multiple, most).images == images


def test_no_room_is_one_line():
    assert resolve(Found(8, ""), 4, 2) == 64 and resolve(Found(8, ""), 4, None) == 32
    with pytest.raises(ConfigError, match=r"expected room for one image, got none .+; take a smaller --model"):
        resolve(Found(0, "computed"), 1, None)


def test_auto_becomes_a_number_that_a_resumed_run_keeps(images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    flags = ["train", *SMALL, "--data", str(images / "train"), *TINY, "--base-lr", "1e-3", "--lr", "None", "--out", str(out),
             "--batch-size", "auto"]  # fmt: skip
    assert run([*flags, "--steps", "1"]) == 0
    said = capsys.readouterr().out
    # 36 images, in multiples of 8.
    assert re.search(r"batch     32, the largest that fits \(computed: [\d.]+ MiB an image", said), said
    assert "lr        0.000125 at batch 32" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["batch_size"] == 32
    monkeypatch.setattr(autobatch, "find_batch", lambda *arguments: pytest.fail("searched again"))
    assert run([*flags, "--steps", "2", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "batch     32, as in the run that goes on" in said and "resumed at step 1" in said
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_other_commands_ask_for_a_number():
    with pytest.raises(ConfigError, match="--batch-size: expected a number here, got auto"):
        config_of("--steps", "1").check()


def test_flags_of_speed_and_memory_reach_the_run(images, tmp_path, capsys, monkeypatch):
    """Compiled and recomputed blocks, and no graph on a CPU, give the plain run's losses."""
    compile_blocks = compiling.compile_blocks
    compiled = []
    monkeypatch.setattr(
        compiling, "compile_blocks", lambda m: compiled.append(m) or compile_blocks(m, backend="aot_eager")
    )
    limit = torch._dynamo.config.recompile_limit
    flags = ["train", *SMALL, "--data", str(images / "train"), "--val-data", str(images / "val"), *TINY, "--steps", "2",
             "--save-every", "9"]  # fmt: skip
    assert run([*flags, "--out", str(tmp_path / "plain")]) == 0
    assert "graph     not used: it needs a CUDA device, got cpu" in capsys.readouterr().out
    try:
        assert run([*flags, "--compile", "blocks", "--out", str(tmp_path / "a")]) == 0
        assert "compile   5 blocks, when they first run" in capsys.readouterr().out
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert run([*flags, "--checkpointing", "blocks", "--out", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6) and len(compiled) == 1
    assert losses(tmp_path / "b") == losses(tmp_path / "plain")
    assert run([*flags, "--graph", "on", "--out", str(tmp_path / "c")]) == 2
    assert "error: --graph on: expected a CUDA device, got cpu" in capsys.readouterr().err
