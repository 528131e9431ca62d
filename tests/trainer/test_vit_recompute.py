"""Activation checkpointing: the same gradients to the last bit, less kept for the backward pass."""

import dataclasses

import pytest
import torch
from fastmim_kernels import dispatch
from fastmim_pipelines.spec import Batch
from slow_reference import make_rng, model_spec

from fastmim.config import SIZES, Size
from fastmim.memory import Live
from fastmim.methods import base
from fastmim.recompute import set_checkpointing

# Everything that repeats: encoder and decoder blocks, convolutional stages, the regressor, top-K attention, SDMAE's blocks.
CASES = {
    "mae": ("mae", {}, "patch"),
    "conv": ("mae", {}, "conv"),
    "cae": ("cae", {}, "patch"),
    "mixedae": ("mixedae", {}, "patch"),
    "sd_dec": ("icmae", dict(contrast="sd_dec", head_hidden=64), "patch"),
    "simmim": ("simmim", {}, "patch"),
}
BATCH = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(48, 3, 3))


def gradients(case: str, policy: str, *, low: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the bytes that live on after the forward pass."""
    name, options, stem = CASES[case]
    fields = base.find(name).Config.__dataclass_fields__
    decoder = {o: v for o, v in dict(decoder_width=48, decoder_depth=2, decoder_heads=3).items() if o in fields}
    spec = dataclasses.replace(model_spec(16, 24, 4), stem=stem)
    method = base.build(name, spec, base.find(name).Config(**options, **decoder), 0)
    set_checkpointing(method, policy)
    g = torch.Generator().manual_seed(0)
    crops = tuple(torch.randint(0, 256, (BATCH, 3, *c.size), generator=g, dtype=torch.uint8) for c in method.crops)
    batch, rng = Batch(crops, torch.arange(BATCH)), make_rng()
    with Live([*method.parameters(), *method.buffers(), *crops, batch.ids, rng]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = method(batch, rng).loss
        kept = live.now
    loss.backward()
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits_and_less_is_kept(case, low):
    expected, everything = gradients(case, "none", low=low)
    kept = {"none": everything}
    for policy in ("mlp", "blocks"):
        found, kept[policy] = gradients(case, policy, low=low)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), (policy, name)
    assert kept["blocks"] < kept["mlp"], kept
    if low and dispatch.backend_of("dense", "cpu") == "native":
        assert kept["mlp"] == kept["none"], "the kernels compute GELU again in any case"
    else:
        assert kept["mlp"] < kept["none"], kept


def test_without_gradient_nothing_is_recomputed():
    name, options, _ = CASES["mae"]
    method = base.build(name, model_spec(16, 24, 4), base.find(name).Config(**options), 0)
    images = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    with torch.no_grad():
        plain = method.encoder.features(images)
        for policy in ("mlp", "blocks"):
            set_checkpointing(method, policy)
            assert torch.equal(method.encoder.features(images), plain)
