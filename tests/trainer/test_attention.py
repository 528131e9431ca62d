"""Which implementation of attention runs: measured, remembered, overridden; all of them compute the same."""

import time

import pytest
import torch
from slow_reference import softmax_attention

from fastmim import attention
from fastmim.attention import CANDIDATES, Candidate, Size, attend_packed, attend_tokens, choose, measure
from fastmim.blocks import Block
from fastmim.config import ConfigError


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(attention, "CHOSEN", {})
    monkeypatch.delenv(attention.VARIABLE, raising=False)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def slow(q, k, v) -> torch.Tensor:
    """(B, M, heads, d), one head of one image at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            out[b, :, h] = softmax_attention(*(x[b, :, h].double() for x in (q, k, v)))
    return out


# ---- what they compute


@pytest.mark.parametrize("name", [name for name, candidate in CANDIDATES.items() if candidate.is_on("cpu")])
@pytest.mark.parametrize("queries, keys", [(7, 7), (3, 10), (1, 5)])
def test_every_implementation_is_softmax_of_scaled_products(name, queries, keys, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, name)
    q, k, v = tokens(2, queries, 3, 8), tokens(2, keys, 3, 8, seed=1), tokens(2, keys, 3, 8, seed=2)
    grad = torch.randn(2, queries, 3, 8, generator=torch.Generator().manual_seed(3))
    expected = slow(q, k, v)
    found = [attend_tokens(q, k, v)]
    if queries == keys:
        found.append(attend_packed(torch.stack([q, k, v], dim=2)))
    gradients = torch.autograd.grad(expected, (q, k, v), grad.double())
    for out in found:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, truth in zip(torch.autograd.grad(out, (q, k, v), grad), gradients, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_rows_of_a_block_equal_those_of_all(key_bias, dtype):
    """In float32 queries are projected for these rows alone; in bfloat16 a packed kernel may compute all of them."""
    torch.manual_seed(0)
    block, x, rows = Block(48, 3, key_bias=key_bias), tokens(2, 9, 48), torch.tensor([[8, 0, 3], [2, 7, 1]])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        qkv = block.attn.qkv(block.norm1(x)[0])
        results = (block(x), block(x, rows=rows), block(x, rows=rows, qkv=qkv))
        whole, part, projected = (branch.added_to(stream) for stream, branch in results)
    expected = torch.stack([image[row] for image, row in zip(whole, rows)])
    close = dict(rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-2)
    torch.testing.assert_close(part, expected, **close)
    torch.testing.assert_close(projected, expected, **close)
    weight = block.attn.qkv.weight
    (for_part,) = torch.autograd.grad(part.square().sum(), weight, retain_graph=True)
    (for_whole,) = torch.autograd.grad(expected.square().sum(), weight)
    error = (for_part - for_whole).norm() / for_whole.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)


# ---- which one runs


def waiting(seconds: float, names: list[str], name: str):
    def compute(q, k, v):
        names.append(name)
        time.sleep(seconds)
        return q * 1

    return compute


@pytest.fixture
def faked(monkeypatch) -> list[str]:
    """Three implementations on the device "meta": one slow, one fast, one that refuses; returns who was called."""
    called: list[str] = []

    def refuse(q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.")

    found = {
        "torch": Candidate(waiting(0.02, called, "torch"), ("meta",)),
        "fast": Candidate(waiting(0.0, called, "fast"), ("meta",)),
        "refusing": Candidate(refuse, ("meta",)),
        "elsewhere": Candidate(waiting(0.0, called, "elsewhere"), ("cuda",)),
        "absent": Candidate(waiting(0.0, called, "absent"), ("meta",), package="no_such_package"),
    }
    monkeypatch.setattr(attention, "CANDIDATES", found)
    monkeypatch.setattr(attention, "REPEATS", 3)
    return called


def ask(queries: int, keys: int, batch: int = 2) -> torch.Tensor:
    q, k = (torch.empty(batch, n, 3, 8, device="meta") for n in (queries, keys))
    return attend_tokens(q, k, k)


def test_the_fastest_at_each_size_of_a_step_is_taken(faked):
    def step():
        ask(5, 5)
        with torch.no_grad():
            ask(5, 9)

    lines = choose(step, "meta")
    assert set(faked) == {"torch", "fast"}
    assert lines[0].startswith("attention fast for 5 x 5 tokens, 3 heads of 8, forward and backward (ms: torch ")
    assert lines[1].startswith("attention fast for 5 x 9 tokens, 3 heads of 8, forward (ms: torch ")
    assert not any("refusing" in line for line in lines) and len(lines) == 2
    faked.clear()
    # Also in other batches; sizes that the step does not have are left to torch.
    ask(5, 5, batch=7), ask(6, 5)
    assert faked == ["fast", "torch"]


def test_a_variable_takes_one_for_all_sizes_and_nothing_is_measured(faked, monkeypatch):
    attention.CHOSEN[Size("meta", torch.float32, 5, 5, 3, 8, True)] = "torch"
    monkeypatch.setenv(attention.VARIABLE, "fast")
    assert choose(lambda: pytest.fail("no need to run a step"), "meta") == ["attention fast (FASTMIM_ATTENTION)"]
    ask(5, 5)
    assert faked == ["fast"]


def test_a_variable_that_cannot_be_followed_is_one_line(monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, "cudn")
    with pytest.raises(
        ConfigError, match=r"FASTMIM_ATTENTION: expected one of kernels, .*, got cudn; did you mean cudnn\?"
    ):
        choose(lambda: None, "cuda")
    monkeypatch.setenv(attention.VARIABLE, "cudnn")
    with pytest.raises(ConfigError, match="expected one of kernels, flash, math, torch on this cpu device, got cudnn"):
        attend_tokens(*(tokens(1, 2, 1, 4) for _ in range(3)))


def test_a_cpu_has_nothing_to_measure():
    assert choose(lambda: pytest.fail("no need to run a step"), "cpu") == ["attention kernels"]


def test_real_implementations_are_measured():
    """On a CPU by hand; as on a GPU, refusals are left out."""
    line = measure(Size("cpu", torch.float32, 5, 7, 2, 8, True), batch=2)
    (name,) = attention.CHOSEN.values()
    assert name in ("kernels", "flash", "math", "torch") and line.startswith(f"attention {name} for 5 x 7 tokens")
