"""The step benchmark: its ways compute the same, it goes on where it stopped, its tables come from its lines."""

import importlib
import json
import sys

import pytest
from trainer_run import ROOT

from fastmim.bench import _command, config_of
from fastmim.cli import run
from fastmim.config import SIZES, ConfigError, Size

CEILING = {"suite": "ceiling", "device": "cpu", "device_type": "cpu", "threads": 1, "torch": "0", "commit": "c",
           "matmul_tflops": 1.0, "matmul_fp32_tflops": 0.1, "copy_gb_s": 10.0}  # fmt: skip


@pytest.fixture
def step(monkeypatch):
    """The script as a module, for encoders of two blocks."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    monkeypatch.setitem(SIZES, "vit_pico", Size(48, 2, 3))
    module = importlib.import_module("bench_step")
    monkeypatch.setattr(module, "ceilings", lambda: dict(CEILING))
    return module


def case(step, method, precision="fp32"):
    return step.make_case(method, "vit_pico", 32, 8, 4, precision)


@pytest.mark.parametrize("method", ["mae", "cmae"])
def test_official_style_gives_our_losses_and_gradients(step, method):
    """Same weights, images and masks: what is timed against each other is the same step."""
    ours, official = step.Ours(case(step, method)), step.OfficialStyle(case(step, method))
    official.prepare()
    for way in (ours, official):
        way.loss = way.forward()
        way.loss.backward()
    assert official.loss.item() == pytest.approx(ours.loss.item(), rel=1e-5)
    expected = dict(ours.method.named_parameters())
    largest = max(p.grad.norm() for p in expected.values() if p.grad is not None)
    for name, parameter in official.method.named_parameters():
        if expected[name].grad is not None:
            error = (parameter.grad - expected[name].grad).norm()
            assert error <= 1e-4 * expected[name].grad.norm() + 1e-6 * largest, name


def test_ways_agree_are_counted_and_a_broken_run_goes_on(step, tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    options = dict(rounds=3, checked=3, seconds=60)
    first = step.run([case(step, "cmae")], ["ours", "plain", "official"], path, **options)
    ways = {r["provider"]: r for r in first if r["suite"] == "step"}
    assert list(ways) == ["ours", "plain", "official"] and all(r["loss_error"] <= 1e-5 for r in ways.values())
    assert ways["ours"]["host_syncs"] == 0 and ways["official"]["host_syncs"] == 1
    assert ways["ours"]["ops"] < ways["plain"]["ops"] and ways["ours"]["ops"] < ways["official"]["ops"]
    assert 0 < ways["ours"]["saved_mib"] <= ways["official"]["saved_mib"]
    before = path.read_text()
    step.run([case(step, "cmae"), case(step, "simmim")], ["ours"], path, **options)
    assert "in the file already" in capsys.readouterr().out
    assert path.read_text().startswith(before)
    methods = [json.loads(line).get("method") for line in path.read_text().splitlines()]
    assert methods.count("cmae") == 3 and methods.count("simmim") == 1


def test_nothing_is_timed_if_losses_differ(step, tmp_path, monkeypatch):
    class Wrong(step.OfficialStyle):
        def forward(self):
            return super().forward() * 1.001

    monkeypatch.setitem(step.MAKE, "official", Wrong)
    path = tmp_path / "steps.jsonl"
    with pytest.raises(AssertionError, match="official: losses"):
        step.run([case(step, "mae")], ["ours", "official"], path, rounds=3, checked=2, seconds=60)
    assert [json.loads(line)["suite"] for line in path.read_text().splitlines()] == ["ceiling"]


def test_ways_that_do_not_exist_say_why(step, monkeypatch):
    assert step.why_not("official", "cae") == "official.py has MAE and CMAE"
    monkeypatch.setenv("FASTMIM_BENCH_COMPILE", "0")
    assert step.why_not("stock", "mae") == "FASTMIM_BENCH_COMPILE=0" and step.why_not("ours", "cae") == ""


def test_report_is_made_of_the_lines(step, tmp_path):
    report = importlib.import_module("report")
    machine = {k: CEILING[k] for k in ("device", "device_type", "threads", "torch", "commit")}
    point = {"suite": "step", **case(step, "mae"), **machine, "provider": "ours", "n": 7, "ms": 10.0, "ms_20": 9.0,
             "ms_80": 12.0, "images_per_s": 400.0, "mfu_measured": 0.123, "loss_error": 0.0, "ops": 5, "host_syncs": 0,
             "saved_mib": 3.0}  # fmt: skip
    slow = {**point, "provider": "official", "ms": 25.0, "images_per_s": 160.0, "loss_error": 2e-6}
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (CEILING, slow, point)))
    report.write_report(path)
    text = path.with_suffix(".md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| mae")]
    assert rows[0].startswith("| mae vit_pico/8 32px b4 fp32 | ours | 7 | 10.0 (9.0, 12.0) | 400.0 | 12 % | 1.00x |")
    assert "| official |" in rows[1] and "| 2.50x | 2.0e-06 |" in rows[1]
    assert "products 1 TFLOP/s, copies 10 GB/s" in text


# ---- the command


def test_command_starts_the_scripts_with_their_own_names_for_a_file():
    assert _command("step", ["--json", "f.jsonl"])[0][1:] == ["--json", "f.jsonl"]
    command, env = _command("kernels", ["--json", "f.jsonl", "-k", "gather"])
    assert command[-2:] == ["-k", "gather"] and env == {"FASTMIM_BENCH_OUT": "f.jsonl"}
    assert _command("loader", ["--json", "out/f.jsonl"])[0][1:] == ["--write", "out/f"]
    with pytest.raises(ConfigError, match="--json: expected a file"):
        _command("loader", ["--json"])


def test_command_lists_the_suites(capsys):
    assert run(["bench"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("step", "kernels", "loader", "e2e"))


def test_records_are_configurations(step):
    config = config_of(case(step, "cmae", "bf16"))
    assert (config.method, config.model, config.batch_size, config.precision) == ("cmae", "vit_pico", 4, "bf16")
    assert config.model_spec().image_size == (32, 32) and config.preset == "paper"
