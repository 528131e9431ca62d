"""`fastmim plan`: memory against what torch's allocator is asked for, traffic and times against formulas by hand."""

import importlib
import json
import math
import os
import re
import sys
from contextlib import nullcontext
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
from fastmim.engine.ddp import data_parallel
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


def test_gradients_that_wait_for_the_next_micro_batch_are_counted_once():
    """By hand, 1000 parameters: 12 bytes each and gradients of 4, DDP's buckets of 4 besides; one micro-batch has no more."""
    load = Load(trained=1000, frozen=0, micro_batch=1, accumulate=1, flops=0.0, saved=0.0)
    more = load._replace(accumulate=2)
    assert [roofline.state_bytes(stage, load, 4) for stage in ("single", "ddp")] == [12_000, 16_000]
    assert [roofline.state_bytes(stage, more, 4) for stage in ("single", "ddp")] == [16_000, 20_000]
    # Beside them nothing of a gradient stays in what a micro-batch takes.
    assert [roofline.gradient_share("single", k) for k in (1, 2)] == [1, 0]
    for stage in roofline.STAGES[1:]:
        assert roofline.state_bytes(stage, more, 4) == roofline.state_bytes(stage, load, 4)


def test_ddp_accumulates_outside_of_its_buckets(tmp_path):
    """What the bytes above rest on: gradients of a first micro-batch are tensors of their own until the last one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = data_parallel(torch.nn.Linear(8, 8), torch.device("cpu"))
        for _ in range(2):
            sizes = []
            for context in (parallel.no_sync(), nullcontext()):
                with context:
                    parallel(torch.ones(1, 8)).sum().backward()
                sizes.append(parallel.module.weight.grad.untyped_storage().nbytes())
            assert sizes == [4 * 64, 4 * 72]
            parallel.module.zero_grad(set_to_none=True)
    finally:
        torch.distributed.destroy_process_group()


def test_state_with_offload_is_the_engines():
    """1 M parameters on one GPU: half of them is left by an optimizer on the host, and little by parameters there."""
    load = Load(1_000_000, 0, micro_batch=1, accumulate=1, flops=0.0, saved=0.0)
    buffers = {"zero 2 optimizer": 4e6, "zero 3 all": 8e6}
    for stage, buffer in buffers.items():
        level, offload = roofline.parts(stage)
        held = engines.state_bytes("zero", level, offload, 2, 1_000_000, 0)
        assert roofline.state_bytes(stage, load, 2) == held + buffer


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
    assert again.time("single").total == pytest.approx(seconds, rel=0.01)
    with pytest.raises(ConfigError, match="expected bf16 steps of ours, found none"):
        plan.measured(file, "mae", "bf16")
    arguments = ["--method", "mae", "--model", "vit_tiny", "--batch-size", "64", "--precision", "fp32"]
    assert run(["plan", "--measured", str(file), "--gpus", "1", *arguments]) == 0
    text = capsys.readouterr().out
    assert "on 1 x CPU of a test" in text, "--gpus is not --gpu"
    # What `fastmim bench step` calls MFU: of measured products, not of those over 0.8. A CPU has no data sheet.
    planned = plan.make_plan(parse_train(["--preset", "paper", *arguments]), Cluster(found, 1), efficiency)
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
    assert planned.time("single").total == pytest.approx(seconds(24), rel=0.01)
    noise = plan.fit(point | {"other_ms": 2 * point["ms"]}, at_limit)
    assert noise.op_seconds == at_limit.op_seconds, "a smaller batch that takes longer says nothing"
    # Nor does one from which computing would be faster than the machine.
    fast, slow = (
        plan.seconds_at_ceilings(plan.alone(bench.config_of({**sizes, "batch_size": n})), at_limit) for n in (64, 16)
    )
    load = plan.alone(bench.config_of({**sizes, "batch_size": 64}))
    times = {"ms": 1e3 * (fast / 2 + 1e-2 * load.ops), "other_ms": 1e3 * (slow / 2 + 1e-2 * load.ops)}
    assert plan.fit(point | times, at_limit).op_seconds == at_limit.op_seconds


def test_plan_learns_nothing_from_micro_batches_of_one_size(small):
    """A quarter of the batch in a quarter of the micro-batches: the two times differ by the optimizer's and noise."""
    machine = roofline.Machine("CPU of a test", 9e12, 1e12, math.inf, 10e9, 0.0, is_cpu=True)
    point = {"method": "mae", "model": "vit_tiny", "image_size": 64, "patch_size": 16, "precision": "fp32"}

    def ms(images: int, parts: int) -> float:
        load = plan.alone(bench.config_of({**point, "batch_size": images}), parts)
        return 1e3 * (2 * plan.seconds_at_ceilings(load, machine) + 1e-4 * parts * load.ops)

    whole = point | {"batch_size": 64, "other_batch": 16, "other_micro_batches": 1, "other_ms": ms(16, 1)}
    alike = plan.fit(whole | {"micro_batches": 4, "ms": ms(64, 4)}, machine)
    other = plan.fit(whole | {"micro_batches": 1, "ms": ms(64, 1)}, machine)
    assert (alike.op_seconds, other.op_seconds) == (machine.op_seconds, pytest.approx(1e-4))


def test_efficiency_is_by_what_the_machine_needs_for_operations():
    """0.8 of a second computed, where the point alone would say 0.9; at least half of it."""
    point = plan.Fit(seconds=1.0, limit=0.4, starts=1000, op_seconds=1e-4, least=0.5)
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
    options = dict(rounds=7, checked=2, seconds=30)
    step.run([step.make_case(method, "vit_pico", 64, 8, 4, precision)], ["ours"], file, **options)
    machine, share, _ = plan.measured(file, method, precision)
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
