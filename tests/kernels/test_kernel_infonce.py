"""Contrastive loss against Python floats, under autocast, and its gradients."""

import math

import fastmim_kernels as fk
import pytest
import torch
import torch.nn.functional as F


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    ).to(dtype)


def slow_loss(q, k, offset, temperature, smoothing=0.0):
    losses = []
    for i, row in enumerate(q.tolist()):
        logits = [sum(a * b for a, b in zip(row, other, strict=True)) / temperature for other in k.tolist()]
        top = max(logits)
        log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
        losses.append(log_sum - (1 - smoothing) * logits[i + offset] - smoothing * sum(logits) / len(logits))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "keys", "offset", "width"), [(7, 7, 0, 100), (3, 12, 9, 256), (3, 12, 3, 33), (1, 1, 0, 1)]
)
def test_contrastive_loss_equals_python_floats(batch, keys, offset, width, smoothing):
    q, k = unit(batch, width), unit(keys, width, seed=1)
    got = fk.contrastive_loss(q, k, offset=offset, temperature=0.07, label_smoothing=smoothing)
    assert got.dtype == torch.float32 and got.ndim == 0
    assert float(got) == pytest.approx(slow_loss(q, k, offset, 0.07, smoothing), rel=2e-6, abs=2e-6)


def test_autocast_does_not_degrade_the_logits():
    q, k = unit(64, 256), unit(512, 256, seed=1)
    plain = fk.contrastive_loss(q, k, temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fk.contrastive_loss(q, k, temperature=0.07)
        degraded = F.cross_entropy(q @ k.T / 0.07, torch.arange(64))
    assert torch.equal(inside, plain) and inside.dtype == torch.float32
    # The check can fail: the same expression without protection does differ.
    assert abs(float(degraded) - float(plain)) > 1e-5


def test_low_precision_inputs_are_multiplied_in_float32():
    q, k = unit(5, 64, dtype=torch.bfloat16), unit(9, 64, seed=1, dtype=torch.bfloat16)
    assert float(fk.contrastive_loss(q, k, temperature=0.1)) == pytest.approx(
        slow_loss(q.float(), k.float(), 0, 0.1), rel=2e-6
    )


def test_gradients_of_both_arguments():
    q = unit(3, 4, dtype=torch.float64).requires_grad_()
    k = unit(6, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k: fk.contrastive_loss(q, k, offset=2, temperature=0.2, label_smoothing=0.1), (q, k)
    )


def test_detached_keys_get_no_gradient_and_two_ranks_give_the_mean():
    q, k = unit(8, 16).requires_grad_(), unit(8, 16, seed=1)
    whole = fk.contrastive_loss(q, k, temperature=0.07)
    halves = [fk.contrastive_loss(q[4 * r : 4 * r + 4], k, offset=4 * r, temperature=0.07) for r in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    whole.backward()
    assert q.grad is not None and k.grad is None


def test_equal_vectors_give_the_logarithm_of_the_number_of_keys():
    ones = torch.ones(4, 3)
    assert float(fk.contrastive_loss(ones, ones.repeat(4, 1), temperature=1.0)) == pytest.approx(math.log(16), rel=1e-6)


@pytest.mark.parametrize(
    ("q", "k", "named", "message"),
    [
        ((2, 3), (2, 4), {}, r"q, k: expected \(B, D\) and \(N, D\), not empty, got \(2, 3\) and \(2, 4\)"),
        ((0, 3), (2, 3), {}, "q, k: expected"),
        ((2, 3, 1), (2, 3), {}, r"q: expected shape \(B, D\)"),
        ((2, 3), (4, 3), {"offset": 3}, r"offset: expected 0..2 \(N - B\), got 3; pass rank \* B"),
        ((3, 3), (2, 3), {}, "offset: expected"),
        ((2, 3), (2, 3), {"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ((2, 3), (2, 3), {"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\)"),
    ],
    ids=range(7),
)
def test_wrong_arguments_raise(q, k, named, message):
    with pytest.raises(ValueError, match=message):
        fk.contrastive_loss(torch.zeros(q), torch.zeros(k), **{"temperature": 0.1, **named})
