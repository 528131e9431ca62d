"""The step benchmark: its ways compute the same, what is missing is said, its counts and the command."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
from trainer_run import ROOT

from fastmim import compiling
from fastmim.bench import _command, config_of
from fastmim.cli import run
from fastmim.config import SIZES, ConfigError, Size
from fastmim.methods import base as methods

CEILING = {"suite": "ceiling", "device": "a CPU", "matmul_tflops": 1.0, "matmul_fp32_tflops": 0.1, "copy_gb_s": 10.0}


LIGHT = {
    "mae": dict(decoder_depth=2),
    "cmae": dict(pixel_decoder_depth=2, feature_decoder_depth=1, head_hidden=48, head_out=16),
}


@pytest.fixture
def step(monkeypatch):
    """The script as a module, for encoders of two blocks, and decoders as small."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    monkeypatch.setitem(SIZES, "vit_pico", Size(48, 2, 3))
    for name, sizes in LIGHT.items():
        presets = methods.find(name).PRESETS
        options = replace(presets["paper"].options, decoder_width=32, decoder_heads=4, **sizes)
        monkeypatch.setitem(presets, "paper", presets["paper"]._replace(options=options))
    machine, module = (importlib.import_module(name) for name in ("machine", "bench_step"))
    monkeypatch.setattr(machine, "ceilings", lambda: CEILING | machine.machine())
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


@pytest.mark.parametrize("way", ["timm", "hf", "lightly"])
def test_other_packages_take_our_step(step, way):
    """Their modules with our weights, images and masks: the losses of three steps are ours."""
    reason = step.why_not(way, "mae")
    if reason:
        pytest.skip(reason)
    theirs, ours = (step.Here(step.MAKE[name], case(step, "mae"), 3).facts for name in (way, "ours"))
    assert theirs.losses == pytest.approx(ours.losses, rel=step.TOLERANCE["fp32"])
    assert len(set(ours.losses)) == 3


def test_ways_agree_are_counted_and_missing_ones_are_said(step, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step.MAKE["timm"], "needs", "no_such_package")
    path = tmp_path / "steps.jsonl"
    found = step.run(
        [case(step, "cmae")],
        ["ours", "plain", "official", "timm", "hf"],
        path,
        rounds=3,
        checked=3,
        seconds=60,
        place=step.Here,
    )
    ways = {r["provider"]: r for r in found if r["suite"] == "step"}
    assert list(ways) == ["ours", "plain", "official"] and all(r["loss_error"] <= 1e-5 for r in ways.values())
    assert ways["ours"]["host_syncs"] == 0 and ways["official"]["host_syncs"] == 1
    assert ways["ours"]["launches"] < min(ways["plain"]["launches"], ways["official"]["launches"])
    assert 0 < ways["ours"]["saved_mib"] <= ways["official"]["saved_mib"]
    assert ways["ours"]["backend"] == step.ours_on()
    assert ways["ours"]["slower"] == 1.0 and len(ways["plain"]["rounds_ms"]) == ways["plain"]["n"] == 3
    assert found[0]["suite"] == found[-1]["suite"] == "ceiling" and found[-1]["drift"] == 0.0
    assert ways["ours"]["other_batch"] == 8 and ways["ours"]["other_ms"] > 0 and "other_ms" not in ways["plain"]
    missing = {r["provider"]: r["why"] for r in found if r["suite"] == "missing"}
    assert missing == {"timm": "no_such_package is not installed", "hf": "hf has mae alone"}
    assert "timm       not measured: no_such_package is not installed" in capsys.readouterr().out
    assert [json.loads(line)["suite"] for line in path.read_text().splitlines()] == [r["suite"] for r in found]


def test_a_package_with_other_names_is_missing_not_wrong(step, monkeypatch):
    """Weights that cannot be mapped: no speed, and the reason; ours is measured all the same."""

    class Renamed(step.OfficialStyle):
        def network(self):
            raise LookupError("this version of a_package has other names: head.weight")

    monkeypatch.setitem(step.MAKE, "hf", Renamed)
    new = step.measure(
        case(step, "mae"), ["ours", "hf"], rounds=3, checked=1, seconds=60, ceiling=CEILING, place=step.Here
    )
    assert [(r["suite"], r["provider"]) for r in new] == [("step", "ours"), ("missing", "hf")]
    assert new[1]["why"].endswith("head.weight")


@pytest.mark.parametrize("at", ["start", "turn"])
def test_a_way_that_fails_costs_the_others_nothing(step, at, tmp_path, monkeypatch):
    """As a graph that cannot be captured, or a compiler that gives up: said, tried again another time, and exit status 1."""

    class Failing(step.OfficialStyle):
        taken = 0

        def step(self):
            Failing.taken += 1
            if at == "start" or Failing.taken > 2:
                raise RuntimeError("operation not permitted\nmore words")
            return super().step()

    monkeypatch.setitem(step.MAKE, "official", Failing)
    path = tmp_path / "steps.jsonl"
    found = step.run(
        [case(step, "mae")], ["ours", "official", "plain"], path, rounds=3, checked=2, seconds=60, place=step.Here
    )
    assert [r["provider"] for r in found if r["suite"] == "step"] == ["ours", "plain"]
    (missing,) = (r for r in found if r["suite"] == "missing")
    assert missing["why"] == "it failed: RuntimeError: operation not permitted" and not missing["is_final"]
    assert step.mistakes(found) == [missing["why"]]


def test_nothing_is_timed_if_losses_differ(step, tmp_path, monkeypatch):
    class Wrong(step.OfficialStyle):
        def forward(self):
            return super().forward() * 1.001

    monkeypatch.setitem(step.MAKE, "official", Wrong)
    path = tmp_path / "steps.jsonl"
    arguments = [
        "bench_step.py", "--json", str(path), "--methods", "mae", "--models", "vit_pico", "--batch-sizes", "4", "--image-size", "32",
        "--patch-size", "8", "--precisions", "fp32", "--providers", "official", "--rounds", "3", "--checked", "2",
        "--one-process",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    assert step.main() == 1
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["suite"], r.get("provider")) for r in found[1:-1]] == [("step", "ours"), ("missing", "official")]
    assert found[2]["why"] == "its losses differ from ours by 1.0e-03, 1e-05 are allowed"
    assert "Not measured: official for mae (its losses differ" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(("way", "method"), [("Graph", "cmae"), ("Compiled", "mae")])
def test_what_the_trainer_offers_takes_our_step(step, way, method, monkeypatch):
    """The captured step (on a CPU its program, uncaptured) and compiled blocks (here on torch's eager backend)."""
    providers = importlib.import_module("providers")
    monkeypatch.setattr(providers, "compile_blocks", lambda method: compiling.compile_blocks(method, "eager"))
    theirs, ours = (step.Here(getattr(providers, name), case(step, method), 3).facts for name in (way, "Ours"))
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-6)


def test_ways_that_do_not_exist_say_why(step, monkeypatch):
    assert step.why_not("official", "cae") == "official has mae and cmae alone"
    monkeypatch.setenv("FASTMIM_BENCH_COMPILE", "0")
    assert step.why_not("stock", "mae") == "FASTMIM_BENCH_COMPILE=0" and step.why_not("ours", "cae") == ""


def test_kernels_and_waits_are_told_apart(step):
    """What the profiler of a GPU gives: (name, whether it ran there)."""
    tally = importlib.import_module("counters").tally
    events = [("gemm", True), ("Memcpy HtoD", True), ("norm", True), ("cudaStreamSynchronize", False),
              ("cudaLaunchKernelExC", False), ("cuLaunchKernel", False), ("cudaMemcpyAsync", False), ("gemm", True)]  # fmt: skip
    assert tally(events) == {"launches": 2, "kernels": 3, "host_syncs": 1}


def test_profile_has_the_products_of_a_step(step):
    """A step of ours: the rows are sorted, shares of one whole, which is that of the kinds."""
    found = importlib.import_module("profile_step").profiled(case(step, "mae"), "ours")
    rows, whole = found["top"], sum(found["kinds"].values())
    assert [r["ms"] for r in rows] == sorted((r["ms"] for r in rows), reverse=True)
    assert all(r["ms"] == pytest.approx(r["share"] * whole) for r in rows) and found["step_ms"] > 0
    assert {"products", "attention", "norms", "optimizer"} < set(found["kinds"]) and found["products_tflops"] > 0


@pytest.mark.parametrize(("name", "kind"), [
    ("aten::addmm", "products"), ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopB_NNT", "products"), ("fastmim::linear_backward", "products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"), ("aten::_softmax", "attention"),
    ("void at::native::vectorized_elementwise_kernel<4, GeluFunctor>", "activations"), ("aten::gelu_backward", "activations"),
    ("fastmim::add_layer_norm", "norms"), ("fastmim::restore_tokens", "masks, views, losses"), ("aten::copy_", "copies"),
    ("aten::convolution_backward", "convolutions"), ("aten::_fused_adamw_", "optimizer"), ("aten::linalg_vector_norm", "optimizer"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "optimizer"), ("aten::mul", "pointwise and sums"),
    ("fastmim::linear_cross_entropy", "masks, views, losses"), ("aten::empty", "starting operations, and others"),
])  # fmt: skip
def test_operations_have_a_kind(step, name, kind):
    assert importlib.import_module("profile_step").kind_of(name) == kind


# ---- the command


def test_command_starts_the_scripts_with_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTMIM_BENCH_SHORT", raising=False)
    for suite in ("step", "loader", "e2e"):
        assert _command(suite, ["--json", "f.jsonl"])[0][1:] == ["--json", "f.jsonl"]
    command, env = _command("kernels", ["--json", "f.jsonl", "-k", "gather"])
    assert command[-2:] == ["-k", "gather"]
    assert env == {"FASTMIM_BENCH_OUT": str(tmp_path / "f.jsonl"), "FASTMIM_BENCH_SHORT": "0"}
    with pytest.raises(ConfigError, match="--json: expected a file"):
        _command("kernels", ["--json"])


def test_command_lists_the_suites(capsys):
    assert run(["bench"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("step", "kernels", "loader", "e2e"))


def test_records_are_configurations(step):
    config = config_of(case(step, "cmae", "bf16"))
    assert (config.method, config.model, config.batch_size, config.precision) == ("cmae", "vit_pico", 4, "bf16")
    assert config.model_spec().image_size == (32, 32) and config.preset == "paper"
