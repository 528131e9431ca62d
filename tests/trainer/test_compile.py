"""torch.compile of blocks: no graph break in any method, the same numbers, the same names."""

import shutil

import pytest
import torch
from fastmim_pipelines.spec import Batch
from test_accumulation import OPTIONS, SD_DEC, build, distance, make_batch

from fastmim import compiling
from fastmim.config import SIZES, ConfigError, Size
from fastmim.engine.base import Precise

CASES = {name: (name, options) for name, options in OPTIONS.items()} | {"sd_dec": ("icmae", SD_DEC)}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Small networks; nothing that is compiled here outlives a test."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(48, 3, 3))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def images(method, count: int = 8) -> Batch:
    batch = make_batch(method)
    return Batch(tuple(crop[:count] for crop in batch.crops), batch.ids[:count])


def gradients(method, precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    loss = Precise(method, "cpu", precision)(images(method), torch.tensor([3, 11])).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


# In bf16, linear layers and attention are our own compiled ops, too.
@pytest.mark.parametrize(
    ("case", "precision"),
    [*((case, "fp32") for case in CASES), *((case, "bf16") for case in ("cae", "mae", "mixedae"))],
)
def test_blocks_compile_whole_and_give_the_same_gradients(case, precision):
    """Traced by dynamo and by autograd, forward and backward; a graph break would raise."""
    plain, compiled = build(*CASES[case]), build(*CASES[case])
    assert compiling.compile_blocks(compiled, backend="aot_eager") == len(compiling.blocks_of(plain)) > 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]
    (loss, expected), (found, grads) = gradients(plain, precision), gradients(compiled, precision)
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] >= 2 and not stats["graph_break"]
    assert found == pytest.approx(loss, rel=1e-6 if precision == "fp32" else 1e-2)
    assert distance(grads, expected) < (1e-6 if precision == "fp32" else 2e-2)


def test_every_transformer_block_is_found():
    method = build("cmae", OPTIONS["cmae"])
    names = [name for name, module in method.named_modules() if module in compiling.blocks_of(method)]
    assert [n for n in names if n.startswith("encoder")] == [f"encoder.blocks.{i}" for i in range(3)]
    assert {n.partition(".")[0] for n in names} == {"encoder", "pixel_decoder", "feature_decoder", "target_encoder"}


def test_evaluation_runs_uncompiled():
    method = build("mae", OPTIONS["mae"])
    compiling.compile_blocks(method, backend="aot_eager")
    with torch.no_grad(), compiling.uncompiled():
        method.encoder.features(images(method, 3).crops[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_block_through_inductor_on_a_cpu():
    plain, compiled = (build("mae", OPTIONS["mae"]).encoder.blocks[0] for _ in range(2))
    compiled.compile(fullgraph=True, dynamic=False)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    outs = []
    for block in (plain, compiled):
        stream, branch = block(x)
        branch.added_to(stream).square().mean().backward()
        outs.append(branch.added_to(stream).detach())
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-6)
    grads = [{n: p.grad for n, p in block.named_parameters()} for block in (compiled, plain)]
    assert distance(*grads) < 1e-5


def test_missing_compilers_are_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"expected a C\+\+ compiler for a CPU, got no no-such-compiler; install one"):
        compiling.check(torch.device("cpu"), 0)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="expected Triton for a GPU, got none; pip install"):
        compiling.check(torch.device("cuda"), 0)
    with pytest.raises(ConfigError, match="expected ZeRO stage 0, 1 or 2, got 3"):
        compiling.check(torch.device("cpu"), 3)
