"""8-bit products: their numbers, who takes them and who does not, losses beside those of bf16, and what is refused.

CPUs emulate them; where there is a GPU that has them, the product is compared there, too.
"""

import math

import pytest
import torch
from slow_reference import make_batch, make_rng, model_spec, scramble
from test_accumulation import OPTIONS, distance
from torch import Tensor
from trainer_run import TINY, losses

from fastmim import float8
from fastmim.blocks import Block
from fastmim.cli import run as run_command
from fastmim.config import SIZES, ConfigError, Size, TrainConfig
from fastmim.engine.base import Precise
from fastmim.methods import base
from fastmim.recompute import set_checkpointing

CPU = torch.device("cpu")
WIDTH = 48
"""Of the networks here: every layer counts as wide."""
# Largest number, digits after the binary point, exponent of the smallest normal number. Source: arXiv 2209.05433 table 1.
FORMATS = {torch.float8_e4m3fn: (448, 3, -6), torch.float8_e5m2: (57344, 2, -14)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(WIDTH, 2, 3))


def slow_rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in float64, number by number to the nearest of the format times a power of two, ties to even."""
    top, digits, lowest = FORMATS[dtype]
    scale = 2.0 ** (math.floor(math.log2(x.abs().max())) + 1 - math.floor(math.log2(top)))

    def nearest(number: float) -> float:
        number /= scale
        exponent = max(math.floor(math.log2(abs(number))), lowest) if number else lowest
        step = 2.0 ** (exponent - digits)
        return round(number / step) * step * scale

    return torch.tensor([nearest(n) for n in x.double().flatten().tolist()], dtype=torch.float64).view(x.shape)


def build(name: str, **options) -> base.Method:
    torch.manual_seed(0)
    module = base.find(name)
    method = module.METHOD(model_spec(), module.Config(**(OPTIONS[name] | options)))
    scramble(method, 0, 0.02)
    return method


def converted(policy: str, name: str, width: int = 16, **options) -> base.Method:
    method = build(name, **options)
    float8.convert(method, policy, width)
    return method


def step(method: base.Method):
    """(output, gradients) of a step in bf16."""
    output = Precise(method, "cpu", "bf16")(make_batch(method), make_rng())
    output.loss.backward()
    return output, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


# ---- the product


@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradients_against_float64(has_bias):
    """Inputs with a wide range: some numbers are below the format's smallest. (2, 7, 48) -> (2, 7, 32)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 48, generator=g) * torch.logspace(-6, 2, 48)
    x, weight, bias = x.bfloat16(), torch.randn(32, 48, generator=g), torch.randn(32, generator=g)
    bias = bias if has_bias else None
    grad = (torch.randn(2, 7, 32, generator=g) * 1e-7).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.autocast("cpu", torch.bfloat16):
        out = float8.linear(x, weight, bias)
    found = torch.autograd.grad(out, leaves, grad)

    x64, w64 = slow_rounded(x.detach(), torch.float8_e4m3fn), slow_rounded(weight.detach(), torch.float8_e4m3fn)
    expected = x64 @ w64.T + (bias.detach().bfloat16().double() if has_bias else 0)
    for_x = slow_rounded(grad, torch.float8_e5m2) @ w64
    rows, grads = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
    truths = [expected, for_x, grads.T @ rows, grads.sum(0)]
    for ours, truth, dtype in zip(
        (out, *found), truths, (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    ):
        assert ours.dtype == dtype and ours.shape == truth.shape
        # One rounding to bf16; the bias's gradient has none.
        limit = 2**-20 if dtype == torch.float32 and truth.ndim == 1 else 2**-8
        assert (ours.double() - truth).abs().max() <= limit * truth.abs().max()
    # Eight bits are coarse: this is no product in bf16.
    assert (
        5e-3
        < (out.double() - rows.view(x.shape) @ weight.double().T - (0 if bias is None else bias)).std()
        / out.double().std()
        < 5e-2
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < float8.LEAST_CAPABILITY,
    reason="needs a GPU of compute capability 8.9",
)
def test_product_on_a_gpu_equals_the_emulation():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(3, 37, 1024, generator=g), torch.randn(2048, 1024, generator=g), torch.randn(2048)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, weight, bias)]
        out = float8.linear(*leaves)
        results.append([out, *torch.autograd.grad(out.square().mean(), leaves)])
    for ours, truth in zip(*results[::-1]):
        assert (ours.cpu().float() - truth.float()).norm() < 1e-2 * truth.float().norm()


def test_scales_are_powers_of_two_and_zeros_stay():
    for factor in (1e-30, 1e-4, 1.0, 3.3, 1e30):
        x = torch.randn(64, generator=torch.Generator().manual_seed(0)) * factor
        for dtype in FORMATS:
            values, scale = float8.rounded(x, dtype)
            assert math.frexp(scale.item())[0] == 0.5 and torch.isfinite(values.float()).all()
            torch.testing.assert_close(values.double() * scale.double(), slow_rounded(x, dtype), rtol=0, atol=0)
            # What else is in the tensor does not matter.
            more, other = float8.rounded(torch.cat([x, 8 * x.max()[None]]), dtype)
            big = x.abs() > x.abs().max() / 64
            assert torch.equal((more.float() * other)[:64][big], (values.float() * scale)[big])
    values, scale = float8.rounded(torch.zeros(3, 4), torch.float8_e4m3fn)
    assert not values.float().any() and 0 < scale < 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_is_not_hidden(bad):
    """The step would else be taken."""
    x, weight = torch.ones(4, 16), torch.ones(16, 16)
    for which in (x, weight):
        which[1, 2] = bad
        assert float8.linear(x, weight, None).isnan().all()
        which[1, 2] = 1
    x.requires_grad_()
    grad = torch.ones(4, 16, dtype=torch.bfloat16)
    grad[2, 3] = bad
    assert torch.autograd.grad(float8.linear(x, weight, None), x, grad)[0].isnan().all()


# ---- training


@pytest.mark.parametrize("name", ["mae", "cae"])
def test_losses_of_20_steps_follow_those_of_bf16(name):
    """All layers of all blocks in 8 bits: the losses stay within 2 %, and fall alike."""
    curves = {}
    for policy in ("off", "wide"):
        method = converted(policy, name)
        precise, batch = Precise(method, "cpu", "bf16"), make_batch(method, 8)
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.95))
        curves[policy] = []
        for i in range(20):
            output = precise(batch, make_rng(step=i % 4))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            curves[policy].append(output.loss.item())
    plain, low = (torch.tensor(curves[policy]) for policy in ("off", "wide"))
    assert not torch.equal(plain, low) and low[-4:].mean() < 0.9 * low[:4].mean()
    assert ((low - plain) / plain).abs().max() < 2e-2


@pytest.mark.parametrize(("name", "own", "others"), [("cmae", "pixel", "contrast"), ("cae", "pixel", "align")])
def test_targets_leave_the_trained_pass_as_it_is(name, own, others):
    """To the last bit: what the networks with gradient compute, with and without what they are trained towards."""
    plain, low = build(name), converted("targets", name)
    (expected, gradients), (found, grads) = step(plain), step(low)
    assert torch.equal(found.parts[own], expected.parts[own])
    assert not torch.equal(found.parts[others], expected.parts[others])
    assert found.parts[others].item() == pytest.approx(expected.parts[others].item(), rel=0.05)
    assert grads.keys() == gradients.keys() and 0 < distance(grads, gradients) < 0.1
    if name == "cmae":
        # What joins micro-batches is what the pass with gradient computes.
        one, two = (Precise(m, "cpu", "bf16").represent(make_batch(m), make_rng()) for m in (plain, low))
        assert torch.equal(one.online, two.online) and not torch.equal(one.target, two.target)


def test_evaluation_computes_in_bf16():
    plain, low = build("cae"), converted("wide", "cae")
    batch = make_batch(plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for compute in (
            lambda method: method.encoder.features(batch.crops[0]),
            lambda method: method.reconstruct(batch.crops[0], batch.ids, make_rng())[-1],
        ):
            assert torch.equal(compute(low), compute(plain))
        # Also behind a step that has failed.
        with pytest.raises(AttributeError):
            low(None, make_rng())
        assert torch.equal(low.encoder.features(batch.crops[0]), plain.encoder.features(batch.crops[0]))


@pytest.mark.parametrize("policy", ["mlp", "blocks"])
def test_recomputed_activations_give_the_same_gradients(policy):
    plain, recomputed = converted("wide", "mae"), converted("wide", "mae")
    set_checkpointing(recomputed, policy)
    expected, found = step(plain)[1], step(recomputed)[1]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_block_compiles_whole():
    """With gradient, and without: in the latter an evaluation is another graph."""
    plain, compiled = (converted("wide", "cae").encoder.blocks[0] for _ in range(2))
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for block in (plain, compiled):
        block.fc1.passes.is_training = True
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)[1].x
            with torch.no_grad():
                target = block(x)[1].x
                block.fc1.passes.is_training = False
                evaluated = block(x)[1].x
        out.float().square().mean().backward()
        assert (evaluated.float() - target.float()).abs().max() > 0.01 * target.float().std()
        results.append([out.detach(), target, evaluated, block.fc1.weight.grad, block.attn.qkv.weight.grad])
    torch._dynamo.reset()
    for ours, truth in zip(*results[::-1]):
        assert (ours.float() - truth.float()).norm() < 1e-2 * truth.float().norm()


def test_projections_of_some_queries():
    torch.manual_seed(0)
    block = Block(WIDTH, 3, key_bias=False)
    block.attn.qkv.__class__ = float8.Float8Projections
    block.attn.qkv.takes_gradient = True
    torch.nn.init.normal_(block.attn.qkv.q_bias)
    x, queries = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    weight, width = block.attn.qkv.weight, WIDTH
    found = block.attn.qkv(x, queries)
    assert torch.equal(found[0], float8.linear(queries, weight[:width], block.attn.qkv.q_bias))
    assert torch.equal(found[1], float8.linear(x, weight[width:], None))
    torch.testing.assert_close(block.attn.qkv(x)[..., width:], found[1], rtol=0, atol=1e-2)


# ---- who takes them


def names_of(method: base.Method, parts: list) -> set[str]:
    return {name.partition(".")[0] for name, module in method.named_modules() if module in parts}


def test_layers_of_each_policy():
    cmae, cae = build("cmae"), build("cae")
    choice = float8.choose(cmae, "targets")
    assert (len(choice.with_gradient), names_of(cmae, choice.without)) == (0, {"target_encoder"})
    assert len(choice.without) == 8 and choice.left["with gradients alone"] == 16
    choice = float8.choose(cmae, "wide", WIDTH)
    # The decoders are narrower; the target has no gradient.
    assert names_of(cmae, choice.with_gradient) == {"encoder"} and len(choice.with_gradient) == 8
    assert names_of(cmae, choice.without) == {"target_encoder"} and choice.left[f"narrower than {WIDTH}"] == 8
    assert names_of(cae, float8.choose(cae, "targets").without) == {"encoder"}
    assert not any(float8.choose(cmae, "off"))
    assert TrainConfig().fp8 == "off" and type(converted("off", "cmae").encoder.blocks[0].fc1) is type(
        cmae.encoder.blocks[0].fc1
    )
    with torch.device("meta"):
        large = base.build("mae", model_spec(224, 224, 16, 3, "vit_large"), base.find("mae").Config(), 0)
    choice = float8.choose(large, "wide")
    assert (len(choice.with_gradient), dict(choice.left)) == (
        24 * 4,
        {"outside of blocks": 3, "narrower than 1024": 8 * 4},
    )


def test_what_is_refused_and_said(monkeypatch):
    cmae, mae = build("cmae"), build("mae")
    assert float8.check(mae, "off", CPU, "fp32") == []
    with pytest.raises(ConfigError, match="--fp8 targets: expected --precision bf16 for all else, got fp32; give it"):
        float8.check(cmae, "targets", CPU, "fp32")
    with pytest.raises(
        ConfigError,
        match="expected linear layers that it is for, got 3 outside of blocks, 12 with gradients alone; use",
    ):
        float8.check(mae, "targets", CPU, "bf16")
    with pytest.raises(ConfigError, match="got 3 outside of blocks, 12 narrower than 1024; use --fp8 off"):
        float8.check(mae, "wide", CPU, "bf16")
    line, warning = float8.check(cmae, "wide", CPU, "bf16", WIDTH)
    assert line.startswith("fp8       8 linear layers in passes with gradient, 8 in passes without; in bf16 stay ")
    assert warning.startswith("fp8       emulated")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(
        ConfigError, match=r"expected an NVIDIA GPU of compute capability 8\.9, got A100, 8\.0; use --fp8 off"
    ):
        float8.check(cmae, "wide", torch.device("cuda"), "bf16")


def test_a_side_that_16_does_not_divide_stays(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(24, 2, 3))
    choice = float8.choose(build("mae"), "wide", 1)
    assert len(choice.with_gradient) == 4 and choice.left["with sides that 16 does not divide"] == 8


def test_a_run_goes_on_without_it(images, tmp_path, capsys):
    """Checkpoints have the same names and shapes."""
    options = [
        *TINY, "--method", "cmae", "--data", str(images), "--model", "vit_tiny", "--precision", "bf16", "--save-every", "2",
        "--out", str(tmp_path),
    ]  # fmt: skip
    assert run_command(["train", *options, "--steps", "2", "--fp8", "targets"]) == 0
    said = capsys.readouterr().out
    assert "fp8       0 linear layers in passes with gradient, 8 in passes without" in said and "emulated" in said
    assert run_command(["train", *options, "--steps", "4", "--resume", "latest", "--fp8", "off"]) == 0
    assert "fp8" not in capsys.readouterr().out and len(losses(tmp_path)) == 4
