"""`fastmim plan`: memory against what torch's allocator is asked for, traffic and times against formulas by hand."""

import importlib
import json
import math
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from fastmim_kernels import dispatch
from fastmim_pipelines.spec import Batch
from trainer_run import ROOT

from fastmim import bench, plan, roofline, scale
from fastmim.arguments import parse_train
from fastmim.cli import run
from fastmim.config import SIZES, ConfigError
from fastmim.engine import base as engines
from fastmim.memory import StepMemory, trace_step
from fastmim.methods import base as methods
from fastmim.roofline import MACHINES, Cluster, Load

IMAGES = 12


def demo(method: str):
    config = parse_train(["--preset", "demo", "--method", method, "--stem", "patch"])
    return config.model_spec(), config.options


def batch_of(method) -> Batch:
    g = torch.Generator().manual_seed(0)
    shapes = [(IMAGES, 3, *crop.size) for crop in method.crops]
    crops = tuple(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for shape in shapes)
    return Batch(crops, torch.arange(IMAGES))


def measured_peak(name: str, precision: str) -> int:
    """Bytes that a real forward and backward pass adds at most, by the profiler's record of each allocation."""
    model, options = demo(name)
    method = methods.build(name, model, options, 0)
    batch, rng = batch_of(method), torch.zeros(2, dtype=torch.int64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = method(batch, rng).loss
        loss.backward()

    step()
    method.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", methods.available())
def test_traced_memory_is_what_a_step_allocates(name, precision):
    model, options = demo(name)
    traced = trace_step(name, model, options, IMAGES, low_precision=precision == "bf16")
    assert traced.peak == pytest.approx(measured_peak(name, precision), rel=0.1)
    assert 0 < traced.saved <= 1.05 * traced.peak


def test_traced_memory_follows_the_batch_the_policy_and_the_sharding():
    model, options = demo("mae")
    plain, more, most = (trace_step("mae", model, options, n, low_precision=True) for n in (16, 32, 48))
    # The low-precision copies of the weights do not depend on the batch.
    assert most.saved - more.saved == pytest.approx(more.saved - plain.saved, rel=0.01)
    kept_inputs = trace_step("mae", model, options, 16, low_precision=True, policy="blocks")
    assert kept_inputs.saved < 0.5 * plain.saved and kept_inputs.peak < plain.peak
    sharded = trace_step("mae", model, options, 1, low_precision=True, gradient_share=0.0)
    whole = trace_step("mae", model, options, 1, low_precision=True)
    parameters = sum(p.numel() for p in methods.build("mae", model, options, 0).parameters())
    assert 0.25 * 4 * parameters < whole.peak - sharded.peak < 4 * parameters


@pytest.mark.parametrize("name", methods.available())
def test_memory_of_a_gpu_is_the_same_whatever_cpu_computes_it(name, monkeypatch):
    """Hosts differ in their kernels for bfloat16: without them, attention keeps its scores on a CPU."""
    model, options = demo(name)

    def trace(device: str) -> StepMemory:
        return trace_step(name, model, options, IMAGES, low_precision=True, device=device)

    gpu, cpu = trace("cuda"), trace("cpu")
    with dispatch.reference_of("dense"), dispatch.reference_of("qkv"):
        assert trace("cuda") == gpu
        assert trace("cpu").saved > gpu.saved
    assert cpu != gpu or not has_products()
    monkeypatch.setenv("FASTMIM_ATTENTION", "math")
    assert trace("cuda") == gpu


def has_products() -> bool:
    return not dispatch.uses_reference("dense", torch.device("cpu"))


@pytest.mark.parametrize(("device", "kept"), [("cuda", 1), ("cpu", 0)])
def test_gelu_is_kept_for_the_products_of_gpus(device, kept):
    """By hand: four times the width, two bytes, for each token of each block, and not with `--checkpointing mlp`."""
    if device == "cpu" and not has_products():
        pytest.skip("the kernels of this CPU do not multiply bfloat16: as on GPUs")
    model, options = demo("mae")
    saved = {
        (policy, images): trace_step(
            "mae", model, options, images, low_precision=True, policy=policy, device=device
        ).saved
        for policy in ("none", "mlp")
        for images in (IMAGES, 2 * IMAGES)
    }
    # What grows with the batch, that is, without the weights.
    none, mlp = (saved[policy, 2 * IMAGES] - saved[policy, IMAGES] for policy in ("none", "mlp"))
    encoder = SIZES[model.name]
    visible = model.num_patches - round(model.num_patches * options.mask_ratio)
    tokens = encoder.depth * (1 + visible) * encoder.width
    # The last block of the decoder has an MLP for the masked patches alone.
    decoded = (options.decoder_depth - 1) * (1 + model.num_patches) + model.num_patches - visible
    tokens += decoded * options.decoder_width
    assert none - mlp == kept * IMAGES * 4 * 2 * tokens


def test_single_state_is_what_the_engine_holds():
    """Parameters, targets and both moments after a step; gradients are gone then."""
    model, options = demo("cmae")
    method = methods.build("cmae", model, options, 0)
    engine = engines.build("single", method, engines.EngineSpec(
        device=torch.device("cpu"), precision="fp32", accumulate=1, micro_batch=IMAGES, lr=1e-3, weight_decay=0.05,
        betas=(0.9, 0.95), clip=None, zero_stage=0))  # fmt: skip
    engine.backward(engine.forward(batch_of(method), torch.zeros(2, dtype=torch.int64)).loss)
    engine.step()
    held = sum(p.nbytes for p in method.parameters())
    held += sum(t.nbytes for state in engine.optimizer.state.values() for t in state.values())
    assert roofline.state_bytes("single", plan.load_of(method, 0.0, 1), 1) == pytest.approx(held, rel=0.01)


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


def test_machines_have_a_peak():
    for machine in MACHINES.values():
        assert machine.flops and machine.memory > 2e10 and machine.bandwidth > 5e11, machine.name


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
    assert "does not fit" in text and "single, checkpointing blocks" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "--gpu", "h20"], "--gpu: expected one of b200, h200"),
        (["plan", "--gpus", "3"], "take 4095 or 4098"),
        (["plan", "--measured", "nowhere.jsonl"], "--measured: cannot read nowhere.jsonl"),
        (["bench", "stop"], "fastmim bench: expected one of step, kernels, loader, e2e, got stop; did you mean step?"),
    ],
)
def test_plan_and_bench_mistakes_are_one_clear_line(argv, words, capsys):
    assert run(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_plan_takes_ceilings_and_efficiency_from_measurements(small, tmp_path):
    """A step that took twice the time at the ceilings, and starting its operations: efficiency 0.5, and that time again."""
    machine = {"device": "CPU of a test", "device_type": "cpu"}
    point = {"suite": "step", "method": "mae", "model": "vit_tiny", "image_size": 64, "patch_size": 16, "batch_size": 64,
             "precision": "fp32", "provider": "ours", **machine}  # fmt: skip
    ceiling = {"suite": "ceiling", "matmul_tflops": 9.0, "matmul_fp32_tflops": 1.0, "copy_gb_s": 10.0, **machine}
    at_limit = roofline.Machine("CPU of a test", 1e12 / 0.8, math.inf, 10e9 / 0.9, 0.0, is_cpu=True)
    load = plan.alone(bench.config_of(point))
    limit = load.flops * 64 / 1e12 + 5 * load.saved / 10e9 + 28 * load.trained / 10e9
    seconds = 2 * limit + 8e-6 * load.ops
    file = tmp_path / "steps.jsonl"
    points = [ceiling, {**point, "ms": 1e3 * seconds}, {**point, "provider": "stock", "ms": 1}]
    file.write_text("".join(json.dumps(r) + "\n" for r in points))
    found, efficiency, why = plan.measured(file, "mae", "fp32")
    assert efficiency == pytest.approx(0.5) and "1 points" in why
    assert found == at_limit
    again = plan.make_plan(bench.config_of(point), Cluster(found, 1), efficiency)
    assert again.times["single"].total == pytest.approx(seconds, rel=0.01)
    with pytest.raises(ConfigError, match="expected bf16 steps of ours, found none"):
        plan.measured(file, "mae", "bf16")


def test_plan_learns_from_two_batches_what_operations_take(small, tmp_path, monkeypatch):
    """Steps made of 4 times the time at the ceilings, and 30 us per operation: a plan for another size finds both."""
    presets = methods.find("mae").PRESETS
    light = replace(presets["paper"].options, decoder_depth=1, decoder_width=32)
    monkeypatch.setitem(presets, "paper", presets["paper"]._replace(options=light))
    machine = {"device": "CPU of a test", "device_type": "cpu"}
    at_limit = roofline.Machine("CPU of a test", 1e12 / 0.8, math.inf, 10e9 / 0.9, 0.0, is_cpu=True, op_seconds=30e-6)
    sizes = {
        "suite": "step",
        "method": "mae",
        "model": "vit_tiny",
        "image_size": 64,
        "patch_size": 16,
        "precision": "fp32",
    }

    def seconds(images: int) -> float:
        load = plan.alone(bench.config_of({**sizes, "batch_size": images}))
        return 4 * plan.seconds_at_ceilings(load, at_limit) + 30e-6 * load.ops

    point = {**sizes, "batch_size": 64, "provider": "ours", "ms": 1e3 * seconds(64), "micro_batches": 1, "other_batch": 16,
             "other_ms": 1e3 * seconds(16), "other_micro_batches": 1, **machine}  # fmt: skip
    ceiling = {"suite": "ceiling", "matmul_tflops": 9.0, "matmul_fp32_tflops": 1.0, "copy_gb_s": 10.0, **machine}
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (ceiling, point)))
    found, efficiency, _ = plan.measured(file, "mae", "fp32")
    assert efficiency == pytest.approx(0.25) and found.op_seconds == pytest.approx(30e-6)
    planned = plan.make_plan(bench.config_of({**sizes, "batch_size": 24}), Cluster(found, 1), efficiency)
    assert planned.times["single"].total == pytest.approx(seconds(24), rel=0.01)
    noise = plan.fit(point | {"other_ms": 2 * point["ms"]}, at_limit)
    assert noise.op_seconds == at_limit.op_seconds, "a smaller batch that takes longer says nothing"


@pytest.mark.skipif(not os.environ.get("FASTMIM_TIMING"), reason="FASTMIM_TIMING=1: measures, on an idle machine")
@pytest.mark.parametrize("method", methods.available())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_trial_predicts_larger_steps_within_20_percent(method, precision, monkeypatch, tmp_path):
    """Measured at 64 pixels and 4 images, predicted at 96 and 8."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    step = importlib.import_module("bench_step")
    file = tmp_path / "steps.jsonl"
    options = dict(rounds=7, checked=2, seconds=30)
    step.run([step.make_case(method, "vit_pico", 64, 8, 4, precision)], ["ours"], file, **options)
    machine, share, _ = plan.measured(file, method, precision)
    case = step.make_case(method, "vit_pico", 96, 8, 8, precision)
    predicted = 1e3 * plan.make_plan(bench.config_of(case), Cluster(machine, 1), share).times["single"].total
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
