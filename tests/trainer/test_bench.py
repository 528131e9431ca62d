"""The step benchmark: its ways compute the same, what is missing is said, its counts and the command."""

import importlib
import json
import re
import sys
from dataclasses import replace

import pytest
from trainer_run import ROOT

from fastmim import compiling
from fastmim.bench import _command, config_of, exit_code
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
    assert all(r["checked"] == 3 and r["counted_parts"] == 1 for r in ways.values())
    (command,) = {r["command"] for r in ways.values()}
    assert command.endswith(
        "fastmim bench step --methods cmae --models vit_pico --batch-sizes 4 --precisions fp32 --image-size 32 "
        "--patch-size 8 --providers ours plain official timm hf --rounds 3 --checked 3 --seconds 60 --one-process"
    )
    assert str(tmp_path) not in command
    assert ways["ours"]["other_batch"] == 8 and ways["ours"]["other_ms"] > 0 and "other_ms" not in ways["plain"]
    missing = {r["provider"]: r["why"] for r in found if r["suite"] == "missing"}
    assert missing == {"timm": "no_such_package is not installed", "hf": "hf has mae alone"}
    assert "timm       not measured: no_such_package is not installed" in capsys.readouterr().out
    assert [json.loads(line)["suite"] for line in path.read_text().splitlines()] == [r["suite"] for r in found]


@pytest.mark.parametrize(
    "batch, parts, multiple, other", [(32, 2, 1, 4), (64, 4, 1, 4), (16, 1, 4, 4), (64, 1, 1, 16), (6, 1, 1, 12)]
)
def test_the_second_batch_has_micro_batches_of_another_size(step, batch, parts, multiple, other):
    """Or its time would say nothing of what a micro-batch takes whatever its size."""
    facts = step.Facts([], 0.0, None, parts, batch, multiple)
    assert step.other_batch(facts) == other != batch // parts


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


def test_all_micro_batches_of_a_step_are_counted(step, monkeypatch):
    """And what the largest of them saves; a way that takes the whole batch has one."""
    providers, counters = importlib.import_module("providers"), importlib.import_module("counters")
    whole = counters.counted(step.Ours(case(step, "mae")))
    monkeypatch.setattr(providers, "micro_batches", lambda *args: 2)
    halves, official = step.Ours(case(step, "mae")), step.OfficialStyle(case(step, "mae"))
    official.prepare()
    found = counters.counted(halves)
    assert found["counted_parts"] == 2 and counters.counted(official)["counted_parts"] == whole["counted_parts"] == 1
    assert 1.3 * whole["launches"] < found["launches"] < 2 * whole["launches"]
    assert found["saved_mib"] == pytest.approx(whole["saved_mib"] / 2, rel=0.1)
    assert found["host_syncs"] == whole["host_syncs"] == 0
    # What is counted is a step, and leaves nothing behind.
    assert halves.rng[1] == 1 and "forward" not in vars(halves.program)


@pytest.mark.parametrize("key", ["device", "threads", "torch"])
def test_another_machine_measures_the_same_case_anew(step, key, monkeypatch):
    here = step.machine()
    record = {"suite": "step", **case(step, "mae"), "provider": "ours", **here}
    wanted = here | case(step, "mae") | {"provider": "ours"}
    assert step._key(record) == step._key(wanted) != step._key(wanted | {key: "another"})
    points = step.Points(None)
    points.add([record | {key: "another"}])
    monkeypatch.setattr(step, "Points", lambda path: points)
    taken = []
    monkeypatch.setattr(step, "measure", lambda case, *args: taken.append(case) or [])
    for added in ([], [record]):
        points.add(added)
        step.run([case(step, "mae")], ["ours"], None, rounds=3, checked=1, seconds=1)
    assert taken == [case(step, "mae")], "once"


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


MISTAKES = {
    "--checked 0": "argument --checked: expected at least 1, got 0",
    "--rounds 1": "argument --rounds: expected at least 3, got 1",
    "--image-size 33": "--image-size: expected a multiple of --patch-size 8, got 33",
    "--methods mixedae --batch-sizes 3": "--batch-sizes: expected multiples of 4 for mixedae, got 3",
    "--methods mea": "--method: expected one of",
    "--models vit_foo": "vit_foo",
    "--providers us": "argument --providers: invalid choice: 'us'",
    "--round 3 --nonsense 1": "--nonsense",
    "--json FOLDER": "--json: expected a file of lines of JSON, got a folder",
    "--json FOLDER/text.md": "--json: expected a file of lines of JSON, got one of .md",
    "--json FOLDER/text.txt": "expected lines of JSON, line 1 is none",
    "--json FOLDER/last.txt": "expected lines of JSON, its last line is none",
    "--report": "--report: expected --json with a file of results",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(step, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "between_ceilings", None)
    (tmp_path / "text.txt").write_text("no JSON\n")
    (tmp_path / "last.txt").write_text("no JSON")
    words = flags.replace("FOLDER", str(tmp_path)).split()
    small = [
        "--methods",
        "mae",
        "--models",
        "vit_pico",
        "--image-size",
        "32",
        "--patch-size",
        "8",
        "--providers",
        "ours",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *small, *words])
    assert exit_code(step.main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and MISTAKES[flags] in said
    assert (tmp_path / "last.txt").read_text() == "no JSON", "another's file is left as it is"


@pytest.mark.parametrize(("suite", "flags", "words"), [
    ("loader", "--rounds 0", "argument --rounds: expected at least 1, got 0"),
    ("loader", "--photos /nonexistent", "--photos: expected a folder of photographs"),
    ("loader", "--train", "expected --photos"), ("loader", "--json /", "got a folder"),
    ("e2e", "--steps 0", "argument --steps: expected at least 3, got 0"), ("e2e", "--json /", "got a folder"),
    ("e2e", "--data /nonexistent", "--data: expected a folder of images"),
])  # fmt: skip
def test_mistakes_of_the_other_suites_are_one_line(step, suite, flags, words, monkeypatch, capsys):
    module = importlib.import_module(f"bench_{suite}")
    monkeypatch.setattr(sys, "argv", [f"bench_{suite}.py", *flags.split()])
    assert exit_code(module.main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


def test_kernels_take_a_file_in_either_spelling_and_have_a_short_help(tmp_path, capsys):
    for flags in (["--json", "f.jsonl"], ["--json=f.jsonl"]):
        command, env = _command("kernels", [*flags, "-x"])
        assert command[-1] == "-x" and env["FASTMIM_BENCH_OUT"].endswith("/f.jsonl")
    for flags in (["--json="], ["--json", "-x"], [f"--json={tmp_path}"]):
        with pytest.raises(ConfigError, match="--json: expected a file"):
            _command("kernels", flags)
    assert run(["bench", "kernels", "--help"]) == 0
    text, suite = capsys.readouterr().out, (ROOT / "bench" / "bench_kernels.py").read_text()
    assert set(re.findall(r"FASTMIM_BENCH_\w+", suite)) <= set(re.findall(r"FASTMIM_BENCH_\w+", text))
    assert text.count("\n") < 30


def test_plain_torch_that_computes_something_else_is_not_timed(step, monkeypatch):
    kernels = importlib.import_module("bench_kernels")
    device, real = kernels.torch.device("cpu"), kernels.plain_torch.masked_pixel_loss
    # A scalar loss and its gradient.
    small = kernels.pixel_loss.case((2, 3, 32, 32), 16, 3)
    assert kernels.plain(small, device, 1e-5) is real

    def wrong(pred, images, ids_masked, patch_size, *, mean, std, norm=True, kind="mse"):
        return 1.001 * real(pred, images, ids_masked, patch_size, mean=mean, std=std, norm=norm, kind=kind)

    monkeypatch.setattr(kernels.plain_torch, "masked_pixel_loss", wrong)
    with pytest.raises(AssertionError, match=r"expected an error of 1\.0e-05"):
        kernels.plain(small, device, 1e-5)


def test_plain_torch_that_rounds_often_must_agree_in_float64(step, monkeypatch):
    """Whose error in bf16 has no bound: a constant that is off by 1 % shows all the same."""
    kernels = importlib.import_module("bench_kernels")
    device, real = kernels.torch.device("cpu"), kernels.plain_torch.bias_gelu
    small = next(c for c in kernels.cases.load("activation")[1] if "bias_bf" in c.name)
    assert kernels.plain(small, device, 1e-5) is real
    monkeypatch.setattr(kernels.plain_torch, "bias_gelu", lambda x, bias=None: 1.01 * real(x, bias))
    with pytest.raises(AssertionError, match="expected an error"):
        kernels.plain(small, device, 1e-2)


def test_command_lists_the_suites(capsys):
    assert run(["bench"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("step", "kernels", "loader", "e2e"))


def test_records_are_configurations(step):
    config = config_of(case(step, "cmae", "bf16"))
    assert (config.method, config.model, config.batch_size, config.precision) == ("cmae", "vit_pico", 4, "bf16")
    assert config.model_spec().image_size == (32, 32) and config.preset == "paper"
