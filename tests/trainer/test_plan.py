"""`fastmim plan`: traffic and times against formulas by hand, what it prints, what it learns from measured steps."""

import importlib
import json
import math
import os
import re
import sys
from dataclasses import replace

import pytest
from trainer_run import ROOT

from fastmim import bench, efficiency, plan, roofline, scale
from fastmim.arguments import parse_train
from fastmim.cli import run
from fastmim.config import ConfigError
from fastmim.methods import base as methods
from fastmim.roofline import MACHINES, Cluster, Load

# ---- traffic and time


def test_traffic_is_that_of_the_zero_paper():
    """1000 parameters and 10 frozen ones over 4 GPUs, 3 micro-batches: rings send 3/4 of 4 bytes each, by hand."""
    load = Load(trained=1000, frozen=10, micro_batch=1, accumulate=3, flops=0.0, saved=0.0)
    sent = {stage: roofline.traffic(stage, load, 4) for stage in roofline.STAGES}
    assert sent["ddp"] == {"gradients": 6000}
    assert sent["zero 1"] == {"gradients": 6000, "parameters": 3000}
    assert sent["zero 2"] == {"gradients": 18000, "parameters": 3000}
    assert sent["zero 3"] == {"gradients": 9000, "parameters": (6000 + 30) * 3}
    assert all(sum(roofline.traffic(stage, load, 1).values()) == 0 for stage in roofline.STAGES)


def test_step_time_adds_what_nothing_hides():
    """An H200 pair by hand: 1 GFLOP and 1 GB saved per image, 100 M parameters."""
    load = Load(100_000_000, 0, micro_batch=10, accumulate=1, flops=1e12, saved=1e9)
    cluster = Cluster(MACHINES["h200"], 2)
    compute = 1e13 / (0.8 * 989e12) + 5 * 1e9 / (0.9 * 4.8e12)
    one = roofline.step_time("zero 1", load, cluster)
    assert one.compute == pytest.approx(compute)
    assert one.optimizer == pytest.approx(28e8 / 2 / (0.9 * 4.8e12))
    assert one.communication == one.exposed == pytest.approx(3 * 2e8 / (0.8 * 450e9) + 2 * 7e-6)
    ddp = roofline.step_time("ddp", load, cluster)
    assert ddp.communication < 2 / 3 * compute and ddp.exposed == 0
    assert ddp.total == pytest.approx(compute + 2 * one.optimizer)
    half = roofline.step_time("ddp", load, cluster, efficiency=0.5)
    assert half.total == pytest.approx(2 * ddp.total)
    slow = roofline.step_time("ddp", load, cluster._replace(per_node=1, nic=1e9))
    assert slow.exposed == pytest.approx(slow.communication - 2 / 3 * compute)
    hooks = roofline.step_time("zero 3", load._replace(tensors=1000), cluster)
    assert hooks.total == pytest.approx(0.244)


def test_step_time_counts_what_is_computed_again():
    load = Load(0, 0, micro_batch=10, accumulate=1, flops=1e12, saved=9e9)
    cluster = Cluster(MACHINES["h200"], 1)
    again = roofline.step_time("single", load._replace(recomputed=9e9), cluster)
    bytes_seconds = 5 * 9e9 / (0.9 * 4.8e12)
    assert again.compute - roofline.step_time("single", load, cluster).compute == pytest.approx(bytes_seconds / 3)


def test_step_time_with_an_optimizer_on_the_host():
    """By hand: gradients there, weights back, AdamW at the host's bandwidth; and on one GPU DeepSpeed's hooks, too."""
    load = Load(100_000_000, 0, micro_batch=10, accumulate=2, flops=1e12, saved=0.0, tensors=10_000)
    step = roofline.step_time("zero 2 optimizer", load, Cluster(MACHINES["h200"], 1))
    assert step.exposed == pytest.approx(4e8 * 3 / roofline.HOST_LINK)
    assert step.optimizer == pytest.approx(28e8 / roofline.HOST_BANDWIDTH)
    assert step.host == pytest.approx(68e-6 * 20_000)


def test_fp32_products_take_the_time_of_cuda_cores():
    load = Load(0, 0, micro_batch=1, accumulate=1, flops=67e12 * 0.8, saved=0.0)
    h200 = MACHINES["h200"]
    assert roofline.compute_seconds(load._replace(low_precision=False), h200) == pytest.approx(1)
    assert roofline.compute_seconds(load, h200) == pytest.approx(67 / 989)


def test_machines_have_a_peak():
    for machine in MACHINES.values():
        assert machine.flops and machine.memory > 2e10 and machine.bandwidth > 5e11, machine.name
        assert 0.02 < machine.fp32_flops / machine.flops < 0.6, machine.name


def test_peaks_of_data_sheets_by_the_names_of_devices():
    assert roofline.sheet_peak("NVIDIA H200", low_precision=True) == 989e12
    assert roofline.sheet_peak("NVIDIA H200", low_precision=False) == 67e12
    assert roofline.sheet_peak("NVIDIA H200 NVL", low_precision=False) is None
    assert roofline.sheet_peak("x86_64 AVX512", low_precision=True) is None


# ---- the command


def test_plan_prints_every_stage_and_the_engine_that_auto_takes(small, capsys):
    arguments = ["--method", "cmae", "--model", "vit_tiny", "--gpu", "h100", "--gpus", "16", "--accumulate", "2"]
    assert run(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "on 16 x H100" in text and "4096 = 16 GPUs x 2 micro-batches x 128 images" in text
    for stage in roofline.STAGES:
        assert len(re.findall(rf"^  {stage} ", text, re.MULTILINE)) == 2
    assert re.search(r"engine +ddp", text) and "300 epochs of 1281167 images" in text


def test_plan_warns_of_what_does_not_fit(small, capsys, monkeypatch):
    monkeypatch.setitem(MACHINES, "h100", MACHINES["h100"]._replace(memory=6e9))
    assert run(["plan", "--method", "mae", "--model", "vit_tiny", "--gpu", "h100", "--batch-size", "256"]) == 0
    text = capsys.readouterr().out
    advised = r"does not fit; what does: single, checkpointing blocks \((\d+) ms a step, [\d.]+ h\)"
    slow = int(re.search(advised, text)[1])
    assert slow > int(re.search(r"^  single .* (\d+) ms +0 ms", text, re.MULTILINE)[1]), "blocks go forward twice"


def test_plan_of_a_checkpointing_policy_is_of_that_policy(small):
    """The second forward pass of encoder and decoder, a third more products; not of the pixels' embedding."""
    cluster = Cluster(MACHINES["h100"], 1)
    config = parse_train(["--preset", "paper", "--method", "mae", "--model", "vit_tiny", "--batch-size", "64"])
    plans = {policy: plan.make_plan(replace(config, checkpointing=policy), cluster) for policy in plan.POLICIES}
    flops = {policy: found.load.flops for policy, found in plans.items()}
    assert flops["none"] == flops["mlp"] and 1.3 < flops["blocks"] / flops["none"] < 4 / 3
    compute = {policy: found.time("single").compute for policy, found in plans.items()}
    assert compute["none"] < compute["mlp"] < compute["blocks"]
    assert plans["blocks"].load.ops > plans["none"].load.ops


def test_plan_with_an_offload_is_of_that_offload(small, capsys):
    arguments = ["--method", "mae", "--model", "vit_tiny", "--batch-size", "64", "--zero", "2"]
    assert run(["plan", *arguments, "--zero-offload", "optimizer"]) == 0
    text = capsys.readouterr().out
    assert (
        re.search(r"engine +zero 2 optimizer:", text)
        and len(re.findall(r"^  zero 2 optimizer ", text, re.MULTILINE)) == 2
    )


def test_plan_takes_an_offload_that_auto_chooses(small, monkeypatch):
    """16 bytes for each of the parameters are more than half of the memory: the optimizer goes to the host.

    Weights, gradients and DeepSpeed's bucket of as many numbers stay.
    """
    config = parse_train(["--preset", "paper", "--method", "mae", "--model", "vit_tiny", "--batch-size", "64"])
    parameters = plan.make_plan(config, Cluster(MACHINES["h100"], 1)).load.trained
    tight = MACHINES["h100"]._replace(memory=2 * 12 * parameters)
    found = plan.make_plan(config, Cluster(tight, 1))
    assert found.stage == "zero 2 optimizer"
    assert found.memory["zero 2 optimizer", "none"].state == 12 * parameters


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "--gpu", "h20"], "--gpu: expected one of b200, h200"),
        (["plan", "--gpus", "3"], "take 4095 or 4098"),
        (["plan", "--gpus", "0"], "plan --gpus: expected at least 1, finite, got 0"),
        (["plan", "--per-node", "0"], "plan --per-node: expected at least 1, finite, got 0"),
        (["plan", "--network", "0"], "plan --network: expected a finite number above 0, got 0"),
        (["plan", "--images", "-7"], "plan --images: expected at least 1, finite, got -7"),
        (["plan", "--efficiency", "nan"], "plan --efficiency: expected a number above 0, up to 1.5, got nan"),
        (["plan", "--efficiency", "0"], "plan --efficiency: expected a number above 0, up to 1.5, got 0"),
        (["plan", "--efficiency", "50"], "plan --efficiency: expected a number above 0, up to 1.5, got 50"),
        (["plan", "--method", "mixedae", "--batch-size", "6"], "--batch-size: expected a multiple of 4 (processes x"),
        (["plan", "--measured", "nowhere.jsonl"], "--measured: cannot read nowhere.jsonl"),
        (["bench", "stop"], "fastmim bench: expected one of step, kernels, loader, e2e, got stop; did you mean step?"),
    ],
)
def test_plan_and_bench_mistakes_are_one_clear_line(argv, words, capsys):
    assert run(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_plan_takes_ceilings_and_efficiency_from_measurements(small, tmp_path, capsys):
    """A step that took twice the time at the ceilings, and starting its operations: efficiency 0.5, and that time again."""
    machine = {"device": "CPU of a test", "device_type": "cpu"}
    point = {"suite": "step", "method": "mae", "model": "vit_tiny", "image_size": 64, "patch_size": 16, "batch_size": 64,
             "precision": "fp32", "provider": "ours", **machine}  # fmt: skip
    ceiling = {"suite": "ceiling", "matmul_tflops": 9.0, "matmul_fp32_tflops": 1.0, "copy_gb_s": 10.0, **machine}
    at_limit = roofline.Machine("CPU of a test", 9e12 / 0.8, 1e12 / 0.8, math.inf, 10e9 / 0.9, 0.0, is_cpu=True)
    load = efficiency.alone(bench.config_of(point))
    limit = load.flops * 64 / 1e12 + 5 * load.saved / 10e9 + 28 * load.trained / 10e9
    seconds = 2 * limit + 8e-6 * load.ops
    file = tmp_path / "steps.jsonl"
    points = [ceiling, {**point, "ms": 1e3 * seconds}, {**point, "provider": "stock", "ms": 1}]
    file.write_text("".join(json.dumps(r) + "\n" for r in points))
    found, share, why = efficiency.measured(file, "mae", "fp32")
    assert share == pytest.approx(0.5) and "1 points" in why
    assert found == at_limit
    again = plan.make_plan(bench.config_of(point), Cluster(found, 1), share)
    assert again.time("single").total == pytest.approx(seconds, rel=0.01)
    with pytest.raises(ConfigError, match="expected bf16 steps of ours, found none"):
        efficiency.measured(file, "mae", "bf16")
    arguments = ["--method", "mae", "--model", "vit_tiny", "--batch-size", "64", "--precision", "fp32"]
    assert run(["plan", "--measured", str(file), "--gpus", "1", *arguments]) == 0
    text = capsys.readouterr().out
    assert "on 1 x CPU of a test" in text, "--gpus is not --gpu"
    # What `fastmim bench step` calls MFU: of measured products, not of those over 0.8. A CPU has no data sheet.
    planned = plan.make_plan(parse_train(["--preset", "paper", *arguments]), Cluster(found, 1), share)
    share = 100 * planned.images_per_s("single") * planned.flops / 1e12
    assert re.search(rf"^  single .* - +{share:.0f} %$", text, re.MULTILINE)
    assert "data sheet that is not known, and of large products: 1 TFLOP/s, measured" in text
    assert run(["plan", "--measured", str(file), "--gpus", "2", *arguments]) == 2
    assert "plan --gpus: expected 1, as the links of CPU of a test are not known, got 2" in capsys.readouterr().err


def test_plan_learns_from_two_batches_what_operations_take(small, tmp_path, monkeypatch):
    """Steps made of 4 times the time at the ceilings, and 30 us per operation: a plan for another size finds both."""
    presets = methods.find("mae").PRESETS
    light = replace(presets["paper"].options, decoder_depth=1, decoder_width=32)
    monkeypatch.setitem(presets, "paper", presets["paper"]._replace(options=light))
    machine = {"device": "CPU of a test", "device_type": "cpu"}
    at_limit = roofline.Machine(
        "CPU of a test", 9e12 / 0.8, 1e12 / 0.8, math.inf, 10e9 / 0.9, 0.0, is_cpu=True, op_seconds=30e-6
    )
    sizes = {
        "suite": "step",
        "method": "mae",
        "model": "vit_tiny",
        "image_size": 64,
        "patch_size": 16,
        "precision": "fp32",
    }

    def seconds(images: int) -> float:
        load = efficiency.alone(bench.config_of({**sizes, "batch_size": images}))
        return 4 * efficiency.seconds_at_ceilings(load, at_limit) + 30e-6 * load.ops

    point = {**sizes, "batch_size": 64, "provider": "ours", "ms": 1e3 * seconds(64), "micro_batches": 1, "other_batch": 16,
             "other_ms": 1e3 * seconds(16), "other_micro_batches": 1, **machine}  # fmt: skip
    ceiling = {"suite": "ceiling", "matmul_tflops": 9.0, "matmul_fp32_tflops": 1.0, "copy_gb_s": 10.0, **machine}
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (ceiling, point)))
    found, share, _ = efficiency.measured(file, "mae", "fp32")
    assert share == pytest.approx(0.25) and found.op_seconds == pytest.approx(30e-6)
    planned = plan.make_plan(bench.config_of({**sizes, "batch_size": 24}), Cluster(found, 1), share)
    assert planned.time("single").total == pytest.approx(seconds(24), rel=0.01)
    noise = efficiency.fit(point | {"other_ms": 2 * point["ms"]}, at_limit)
    assert noise.op_seconds == at_limit.op_seconds, "a smaller batch that takes longer says nothing"
    # Nor does one from which computing would be faster than the machine.
    fast, slow = (
        efficiency.seconds_at_ceilings(efficiency.alone(bench.config_of({**sizes, "batch_size": n})), at_limit)
        for n in (64, 16)
    )
    load = efficiency.alone(bench.config_of({**sizes, "batch_size": 64}))
    for speed, op_seconds in (
        (2, at_limit.op_seconds),
        (1.15, pytest.approx(1e-2)),
    ):  # ours beat torch's products by 1.15
        times = {"ms": 1e3 * (fast / speed + 1e-2 * load.ops), "other_ms": 1e3 * (slow / speed + 1e-2 * load.ops)}
        assert efficiency.fit(point | times, at_limit).op_seconds == op_seconds


def test_plan_learns_nothing_from_micro_batches_of_one_size(small):
    """A quarter of the batch in a quarter of the micro-batches: the two times differ by the optimizer's and noise."""
    machine = roofline.Machine("CPU of a test", 9e12, 1e12, math.inf, 10e9, 0.0, is_cpu=True)
    point = {"method": "mae", "model": "vit_tiny", "image_size": 64, "patch_size": 16, "precision": "fp32"}

    def ms(images: int, parts: int) -> float:
        load = efficiency.alone(bench.config_of({**point, "batch_size": images}), parts)
        return 1e3 * (2 * efficiency.seconds_at_ceilings(load, machine) + 1e-4 * parts * load.ops)

    whole = point | {"batch_size": 64, "other_batch": 16, "other_micro_batches": 1, "other_ms": ms(16, 1)}
    alike = efficiency.fit(whole | {"micro_batches": 4, "ms": ms(64, 4)}, machine)
    other = efficiency.fit(whole | {"micro_batches": 1, "ms": ms(64, 1)}, machine)
    assert (alike.op_seconds, other.op_seconds) == (machine.op_seconds, pytest.approx(1e-4))


def test_efficiency_is_by_what_the_machine_needs_for_operations():
    """0.8 of a second computed, where the point alone would say 0.9; at least half of it."""
    point = efficiency.Fit(seconds=1.0, limit=0.4, starts=1000, op_seconds=1e-4, least=0.5)
    machine = roofline.Machine("CPU of a test", 9e12, 1e12, math.inf, 10e9, 0.0, is_cpu=True, op_seconds=2e-4)
    assert point.efficiency(machine) == pytest.approx(0.5)
    assert point.efficiency(machine._replace(op_seconds=9e-4)) == pytest.approx(0.8)
    assert point.efficiency(machine._replace(is_cpu=False)) == pytest.approx(0.4)


def test_plan_prints_both_shares_of_a_gpu(small, capsys):
    """80 % of the data sheet is what large products are taken to reach, in fp32 of another sheet's line."""
    arguments = ["--method", "mae", "--model", "vit_tiny", "--gpu", "h200", "--batch-size", "64"]
    for flags, sheet in (([], 989), (["--precision", "fp32"], 67)):
        assert run(["plan", *arguments, *flags]) == 0
        text = capsys.readouterr().out
        assert (
            f"data sheet's {sheet} TFLOP/s, and of large products: {0.8 * sheet:.4g} TFLOP/s, 80 % of that, assumed"
            in text
        )
        of_sheet, of_products = map(int, re.search(r"^  single .* (\d+) % +(\d+) %$", text, re.MULTILINE).groups())
        assert of_sheet == pytest.approx(0.8 * of_products, abs=1)


@pytest.mark.skipif(not os.environ.get("FASTMIM_TIMING"), reason="FASTMIM_TIMING=1: measures, on an idle machine")
@pytest.mark.parametrize("method", methods.available())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_trial_predicts_larger_steps_within_20_percent(method, precision, monkeypatch, tmp_path):
    """Measured at 64 pixels and 4 images, predicted at 96 and 8."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    step = importlib.import_module("bench_step")
    file = tmp_path / "steps.jsonl"
    # Two small batches differ by a few milliseconds, from which the rest follows: the medians of many rounds.
    options = dict(rounds=25, checked=2, seconds=60)
    step.run([step.make_case(method, "vit_pico", 64, 8, 4, precision)], ["ours"], file, **options)
    machine, share, _ = efficiency.measured(file, method, precision)
    case = step.make_case(method, "vit_pico", 96, 8, 8, precision)
    predicted = 1e3 * plan.make_plan(bench.config_of(case), Cluster(machine, 1), share).time("single").total
    (measured,) = (r["ms"] for r in step.run([case], ["ours"], None, **options) if r["suite"] == "step")
    print(f"  {method} {precision}: predicted {predicted:.1f} ms, measured {measured:.1f}, efficiency {share:.2f}")
    assert predicted == pytest.approx(measured, rel=0.2)


# ---- docs/scale.md


def test_scale_page_is_what_the_command_prints():
    assert (ROOT / "docs" / "scale.md").read_text() == scale.document(), "fastmim plan --scale > docs/scale.md"


def test_scale_page_numbers_by_hand():
    """MAE ViT-L, 329.2 M parameters over 8 GPUs: 2 x 7/8 x 4 bytes each."""
    work = scale.load("vit_large", 16, 1)
    assert sum(roofline.traffic("ddp", work, 8).values()) == pytest.approx(2 * 7 / 8 * 4 * 329.2e6, rel=1e-3)
    fewest = scale.fewest_images("zero 1", work, 64, 50e9)
    enough, less = (scale.efficiency("zero 1", work._replace(micro_batch=n), 64, 50e9) for n in (fewest, fewest - 1))
    assert enough >= 0.9 > less
    assert scale.largest("zero 3", 64) > scale.largest("zero 2", 64) > scale.largest("ddp", 64)
