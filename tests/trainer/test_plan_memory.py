"""The memory model behind `fastmim plan` and `--batch-size auto`, against what torch's allocator is asked for."""

from contextlib import nullcontext

import pytest
import torch
from fastmim_kernels import dispatch
from fastmim_pipelines.spec import Batch

from fastmim import roofline
from fastmim.arguments import parse_train
from fastmim.config import SIZES
from fastmim.engine import base as engines
from fastmim.engine.ddp import data_parallel, release_group
from fastmim.memory import StepMemory, trace_step
from fastmim.methods import base as methods
from fastmim.roofline import Load

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
    assert roofline.state_bytes("single", roofline.load_of(method, 0.0, 1), 1) == pytest.approx(held, rel=0.01)


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
        release_group(parallel)
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
