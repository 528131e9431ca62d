"""Exact savers: the same losses and gradients as without them, for less work; and targets that keep nothing."""

import os
import statistics
from unittest.mock import patch

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import make_rng, model_spec, scramble
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmim import savers
from fastmim.config import ConfigError
from fastmim.memory import Saved
from fastmim.methods import base
from fastmim.methods.base import Method

pytestmark = pytest.mark.usefixtures("small")
DECODER = dict(decoder_width=64, decoder_heads=4)
# Decoders of several blocks and of one, pooled, with and without class token, of mixtures, of all tokens; CAE's regressor.
CASES = {
    "mae": ("mae", dict(decoder_depth=2, **DECODER)),
    "mae-one-block": ("mae", dict(decoder_depth=1, **DECODER)),
    "cmae": ("cmae", dict(pixel_decoder_depth=2, feature_decoder_depth=1, **DECODER)),
    "mixedae": ("mixedae", dict(members=2, decoder_depth=2, **DECODER)),
    "mixedae-full": ("mixedae", dict(members=4, cls_mode="none", mode="full", decoder_depth=1, **DECODER)),
    "icmae": ("icmae", dict(head_hidden=64, decoder_heads=4)),
    "icmae-sd_dec": ("icmae", dict(contrast="sd_dec", head_hidden=64, decoder_heads=4)),
    "cae": ("cae", dict(regressor_depth=2, decoder_depth=1)),
}
BATCH = 8


def build(case: str, which: str) -> Method:
    name, options = CASES[case]
    with patch.dict(os.environ, {savers.VARIABLE: which}):
        method = base.build(name, model_spec(16, 24, 4), base.find(name).Config(**options), 0)
    scramble(method)
    return method


def batch_of(method: Method) -> Batch:
    g = torch.Generator().manual_seed(1)
    crops = (torch.randint(0, 256, (BATCH, 3, *crop.size), generator=g, dtype=torch.uint8) for crop in method.crops)
    return Batch(tuple(crops), torch.arange(BATCH) * 7)


def step(case: str, which: str, *, low: bool = False, number: int = 11) -> tuple[float, dict[str, torch.Tensor]]:
    method = build(case, which)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = method(batch_of(method), make_rng(3, number)).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


def distance(found: dict, expected: dict) -> float:
    """Relative, over all gradients."""
    assert found.keys() == expected.keys()
    error = sum((found[n].double() - expected[n].double()).square().sum() for n in expected)
    return float((error / sum(g.double().square().sum() for g in expected.values())).sqrt())


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_plain_version(case):
    loss, expected = step(case, "off")
    for which in ("first", "last"):
        found, gradients = step(case, which)
        assert found == pytest.approx(loss, rel=1e-6)
        assert distance(gradients, expected) < 1e-6, which


@pytest.mark.parametrize("case", ["mae-one-block", "cmae", "mixedae", "cae"])
def test_bfloat16_rounds_no_more_than_in_the_plain_version(case):
    """Both round, each in its own way: the error against float32, in the mean over steps with other masks."""
    ratios = []
    for number in range(5):
        _, exact = step(case, "off", number=number)
        lean, plain = (distance(step(case, which, low=True, number=number)[1], exact) for which in ("all", "off"))
        ratios.append(lean / plain)
    assert statistics.geometric_mean(ratios) < 1.5


def flops_of(case: str, which: str) -> int:
    """Of products, forward and backward."""
    method = build(case, which)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method(batch_of(method), make_rng()).loss.backward()
    return counter.get_total_flops()


def test_the_work_that_is_left_out_is_the_one_that_was_meant(monkeypatch):
    """MAE: of 24 patches, 6 are visible."""
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")  # torch counts its own products alone
    plain, first, last = (flops_of("mae", which) for which in ("off", "first", "last"))
    width, tokens, visible, masked = 64, 25, 7, 18
    # Query, projection and MLP, two products of attention; three passes.
    each = 2 * (1 + 1 + 8) * width**2 + 2 * 2 * tokens * width
    assert plain - last == 3 * BATCH * visible * each
    # Projections of 18 mask tokens per image, or of a table of all 25 tokens' positions.
    assert plain - first == 3 * 2 * 3 * width**2 * (BATCH * masked - tokens)
    assert plain - flops_of("mae", "all") == (plain - first) + (plain - last)


@pytest.mark.parametrize("case", ["mae", "cmae", "mixedae", "icmae", "icmae-sd_dec", "cae"])
def test_every_method_with_a_decoder_works_less(case, monkeypatch):
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")
    assert flops_of(case, "all") < flops_of(case, "off")


# The branch of each method that goes without gradient.
TARGETS = {"cmae": "_target", "icmae": "_target", "icmae-sd_dec": "_target", "cae": "_encode_masked"}


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", TARGETS)
def test_targets_keep_nothing_for_the_backward_pass(case, low, monkeypatch):
    """A step whose target is known beforehand saves as many bytes as one that computes it."""
    method = build(case, "all")
    batch, rng, known = batch_of(method), make_rng(), []
    compute = getattr(method, TARGETS[case])

    def saved_bytes() -> int:
        given = [*method.parameters(), *method.buffers(), *batch.crops, batch.ids, rng, *known]
        saved = Saved(given)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=low):
            method(batch, rng)
        return saved.bytes

    def remember(*args, **kwargs):
        known.append(compute(*args, **kwargs))
        return known[-1]

    monkeypatch.setattr(method, TARGETS[case], remember)
    with_target = saved_bytes()
    (target,) = known
    monkeypatch.setattr(method, TARGETS[case], lambda *args, **kwargs: target)
    assert not target.requires_grad
    # What the loss keeps of the target itself is not of its making.
    assert 0 <= with_target - saved_bytes() <= 2 * target.numel() * 4


def test_an_unknown_saver_is_one_line(monkeypatch):
    monkeypatch.setenv(savers.VARIABLE, "frist")
    with pytest.raises(ConfigError, match="FASTMIM_SAVERS: expected one of all, off, first, last, got frist; did you"):
        savers.chosen()
