"""Token loss against loops in float64 and against torch's own layers; gradients against finite differences."""

import math

import fastmim_kernels as fk
import pytest
import torch
import torch.nn.functional as F


def material(rows=7, width=6, vocabulary=11, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((rows, width), (vocabulary, width), (vocabulary,)))
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[::2] = (x @ weight.T + bias).argmax(1)[::2]
    return *(t.to(dtype).requires_grad_() for t in (x, weight, bias)), labels


def slow(x, weight, bias, labels):
    """(loss, accuracy), number by number."""
    loss, correct = 0.0, 0
    for row, label in zip(x.double().tolist(), labels.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(row, w)) + c for w, c in zip(weight.tolist(), bias.tolist(), strict=True)]
        loss += math.log(sum(math.exp(s) for s in scores)) - scores[label]
        correct += scores.index(max(scores)) == label
    return loss / len(x), correct / len(x)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
@pytest.mark.parametrize("rows", [1, 7])
def test_token_loss_equals_a_sum_over_rows_and_classes(rows, chunk):
    x, weight, bias, labels = material(rows)
    loss, accuracy = fk.linear_cross_entropy(x, weight, bias, labels, chunk=chunk)
    expected = slow(x, weight, bias, labels)
    assert loss.item() == pytest.approx(expected[0], abs=2e-6)
    assert accuracy.item() == pytest.approx(expected[1], rel=1e-6) and expected[1] > 0
    assert loss.shape == accuracy.shape == () and loss.dtype == accuracy.dtype == torch.float32
    assert loss.requires_grad and not accuracy.requires_grad


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize("has_bias", [True, False])
def test_token_loss_gradients_equal_finite_differences(chunk, has_bias):
    x, weight, bias, labels = material(5, 4, 6, torch.float64)
    inputs = (x, weight, bias) if has_bias else (x, weight)

    def loss(x, weight, bias=None):
        return fk.linear_cross_entropy(x, weight, bias, labels, chunk=chunk).loss * 3

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_token_loss_gradients_equal_torch_s(chunk):
    ours, theirs = material(30, 10, 50), material(30, 10, 50)
    fk.linear_cross_entropy(*ours, chunk=chunk).loss.mul(2.5).backward()
    F.cross_entropy(F.linear(*theirs[:3]), theirs[3]).mul(2.5).backward()
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_token_loss_gives_gradients_to_those_that_ask(frozen):
    inputs = material()
    inputs[frozen].requires_grad_(False)
    fk.linear_cross_entropy(*inputs, chunk=3).loss.backward()
    assert [t.grad is not None for t in inputs[:3]] == [i != frozen for i in range(3)]


def test_token_loss_without_grad_costs_no_gradient(monkeypatch):
    """Nothing but the logits is multiplied: 3 chunks, 3 products."""
    inputs, products = material(), []
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: products.append(a.shape) or real(a, b))
    with torch.no_grad():
        loss = fk.linear_cross_entropy(*inputs, chunk=3).loss
    assert len(products) == 3 and not loss.requires_grad
    fk.linear_cross_entropy(*inputs, chunk=3)
    assert len(products) == 3 + 9


def test_token_loss_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    largest = []
    real = torch.Tensor.__matmul__

    def spy(a, b):
        out = real(a, b)
        largest.append(out.numel())
        return out

    inputs = material(rows=40, width=3, vocabulary=100)
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    fk.linear_cross_entropy(*inputs, chunk=8).loss.backward()
    assert max(largest) == 8 * 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_loss_under_autocast_keeps_sums_in_float32(dtype):
    """Loss and gradients within a few roundings of the low precision, although the sum runs over 600 rows."""
    ours = material(600, 24, 40)
    with torch.autocast("cpu", dtype):
        loss = fk.linear_cross_entropy(*ours, chunk=64).loss
    loss.backward()
    exact = material(600, 24, 40)
    truth = F.cross_entropy(F.linear(*(t.double() for t in exact[:3])), exact[3])
    truth.backward()
    unit = torch.finfo(dtype).eps
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=unit)
    for a, b in zip(ours[:3], exact[:3], strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 2 * unit * b.grad.norm()


def test_token_loss_with_float16_and_a_loss_scale_does_not_underflow():
    """Gradients of about 1e-8 survive if the scale of the loss comes before the rounding to float16."""
    inputs = material(2000, 4, 8, torch.float16)
    (fk.linear_cross_entropy(*inputs, chunk=512).loss * 65536).backward()
    exact = material(2000, 4, 8)
    F.cross_entropy(F.linear(*exact[:3]), exact[3]).backward()
    assert (inputs[0].grad.float() / 65536 - exact[0].grad).norm() < 5e-3 * exact[0].grad.norm()


def test_token_loss_of_equal_logits_is_the_log_of_their_number():
    x, weight, bias, labels = material(vocabulary=8192)
    loss, accuracy = fk.linear_cross_entropy(x, torch.zeros_like(weight), torch.zeros_like(bias), labels)
    assert loss.item() == pytest.approx(math.log(8192), rel=1e-6) == pytest.approx(9.0109, abs=1e-4)
    assert accuracy.item() == float((labels == 0).float().mean())


def test_token_loss_stands_large_logits():
    x, weight, bias, labels = material()
    loss = fk.linear_cross_entropy(x * 1e4, weight, bias, labels).loss
    loss.backward()
    assert loss.isfinite() and all(t.grad.isfinite().all() for t in (x, weight, bias))


def test_token_loss_takes_tensors_of_any_strides():
    x, weight, bias, labels = material()
    wide = torch.stack([x, x], -1)[..., 0]
    odd = weight.T.contiguous().T
    assert not wide.is_contiguous() and not odd.is_contiguous()
    one, other = fk.linear_cross_entropy(x, weight, bias, labels), fk.linear_cross_entropy(wide, odd, bias, labels)
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(3, 5)}, ValueError, r"x, weight: expected \(N, D\) and \(V, D\), not empty, got"),
        ({"x": torch.zeros(0, 6)}, ValueError, "x, weight: expected"),
        ({"x": torch.zeros(7, 6).long()}, ValueError, "x, weight, bias: expected floats on one device"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(11,\), got \(4,\)"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: expected shape \(7,\), got \(3,\)"),
        ({"labels": torch.zeros(7)}, TypeError, "labels: expected torch.int64"),
        ({"labels": torch.full((7,), 11)}, IndexError, "labels: expected class numbers in 0..10, got 11..11"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1 row, got 0"),
    ],
    ids=range(8),
)
def test_token_loss_refuses_what_does_not_fit(change, error, message):
    x, weight, bias, labels = material()
    named = {"x": x, "weight": weight, "bias": bias, "labels": labels, **change}
    with pytest.raises(error, match=message):
        fk.linear_cross_entropy(**named)
