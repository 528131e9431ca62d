"""Attention on packed projections: against loops in float64, gradients, lengths that fill no tile, threads, errors."""

import math

import pytest
import torch
from fastmim_kernels import dispatch, qkv_attention
from fastmim_kernels.qkv import reference

BACKENDS = ["reference", *(["native"] if not dispatch.load("qkv", "native") else [])]
SIZES = [(2, 50, 3, 64), (1, 197, 2, 32), (2, 7, 1, 8), (1, 33, 2, 80), (3, 1, 2, 4), (1, 64, 1, 128), (1, 31, 2, 5)]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    return request.param


def random(*shape, seed=0, dtype=torch.bfloat16):
    return (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def slow(qkv, bias=None):
    """One image, one head, one query at a time; weights from the definition, (B, N, H, d) float64."""
    images = []
    for image in qkv.double():
        heads = []
        for h in range(image.shape[2]):
            q, k, v = image[:, :, h].unbind(1)
            rows = []
            for i, query in enumerate(q):
                scores = torch.stack([(query * key).sum() / math.sqrt(len(query)) for key in k])
                scores = scores if bias is None else scores + bias[h, i]
                weights = (scores - scores.max()).exp()
                rows.append((weights[:, None] * v).sum(0) / weights.sum())
            heads.append(torch.stack(rows))
        images.append(torch.stack(heads, 1))
    return torch.stack(images)


def with_gradient(function, qkv, grad, *bias):
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, *bias)]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return out.detach().double(), *(leaf.grad.double() for leaf in leaves)


def error(ours, exact):
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-3))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bfloat16_agrees_with_loops(backend, size):
    qkv, grad = random(size[0], size[1], 3, *size[2:]), random(*size, seed=1)
    exact = with_gradient(slow, qkv.double(), grad)
    # The reference rounds scores and weights; the tiles round weights and their slopes alone.
    limit = 2e-2 if backend == "reference" else 4e-3
    for ours, expected in zip(with_gradient(qkv_attention, qkv, grad), exact):
        assert error(ours, expected) <= limit


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=["fp32", "fp16"])
def test_other_dtypes_agree_with_loops(backend, size, dtype, limit):
    qkv, grad = random(size[0], size[1], 3, *size[2:], dtype=dtype), random(*size, seed=1, dtype=dtype)
    exact = with_gradient(slow, qkv.double(), grad)
    for ours, expected in zip(with_gradient(qkv_attention, qkv, grad), exact):
        assert error(ours, expected) <= limit


@pytest.mark.parametrize("size", [*SIZES, (33, 9, 2, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bias_and_its_gradient_agree_with_loops(backend, size, dtype):
    """Also of more images than one thread sums the gradient of."""
    qkv, grad = random(size[0], size[1], 3, *size[2:], dtype=dtype), random(*size, seed=1, dtype=dtype)
    bias = random(size[2], size[1], size[1], seed=2, dtype=torch.float32)
    exact = with_gradient(slow, qkv.double(), grad, bias.double())
    limit = 1e-5 if dtype == torch.float32 else 2e-2 if backend == "reference" else 4e-3
    ours = with_gradient(qkv_attention, qkv, grad, bias)
    assert len(ours) == 3
    for got, expected in zip(ours, exact):
        assert error(got, expected) <= limit


def test_a_bias_of_low_precision_or_without_gradient(backend):
    qkv, bias = random(2, 21, 3, 2, 16), random(2, 21, 21, seed=2)
    wide = qkv_attention(qkv, bias.float())
    assert error(qkv_attention(qkv, bias).double(), wide.double()) <= 2e-2
    strided = bias.float().transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous() and torch.equal(qkv_attention(qkv, strided), wide)
    leaf, alone = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    qkv_attention(leaf, bias.float()).sum().backward()
    qkv_attention(alone, bias.float().requires_grad_()).sum().backward()
    assert torch.equal(leaf.grad, alone.grad)
    # Keys that no query may see.
    hidden = torch.zeros(2, 21, 21).masked_fill(torch.arange(21) >= 13, -torch.inf)
    torch.testing.assert_close(qkv_attention(qkv, hidden)[:, :13], qkv_attention(qkv[:, :13]), rtol=2e-2, atol=2e-2)


def test_large_scores_do_not_overflow(backend):
    """One key wins by far: the result is its value."""
    qkv = torch.zeros(1, 40, 3, 1, 32, dtype=torch.bfloat16)
    qkv[:, :, 0], qkv[:, 3, 1] = 100, 100
    qkv[:, :, 2] = random(1, 40, 1, 32)
    torch.testing.assert_close(qkv_attention(qkv), qkv[:, 3:4, 2].expand(1, 40, 1, 32), rtol=0, atol=0)


def test_strides_and_empty_batches(backend):
    wide = random(2, 21, 3, 2, 32)
    strided = wide[..., ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(qkv_attention(strided), qkv_attention(strided.contiguous()), rtol=0, atol=0)
    empty = torch.empty(0, 5, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    qkv_attention(empty).sum().backward()
    assert empty.grad.shape == empty.shape


def test_two_runs_and_any_number_of_threads_give_the_same_bits(backend):
    before, results = torch.get_num_threads(), []
    qkv, grad, bias = random(35, 45, 3, 4, 32), random(35, 45, 4, 32, seed=1), random(4, 45, 45, dtype=torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            # The reference's gradient of the bias is a sum over the batch by torch, which cuts it by threads.
            results.append(with_gradient(qkv_attention, qkv, grad, *[bias] * (backend == "native")))
            results[-1] += with_gradient(qkv_attention, qkv, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


def test_products_of_torch_between_two_calls_stay_right(backend):
    """Both use the same tile registers."""
    qkv, x = random(2, 40, 3, 2, 32), random(64, 96)
    first, product = qkv_attention(qkv), x @ x.T
    for _ in range(3):
        assert torch.equal(qkv_attention(qkv), first)
        assert torch.equal(x @ x.T, product)


def test_long_sequences_are_left_to_the_reference(backend):
    qkv = random(1, 1100, 3, 1, 8)
    assert error(qkv_attention(qkv).double(), reference.qkv_attention(qkv.double())) <= 2e-2


@pytest.mark.parametrize(
    ("qkv", "error_type", "words"),
    [
        (torch.zeros(2, 5, 24), ValueError, r"qkv: expected shape \(B, N, 3, H, d\)"),
        (torch.zeros(2, 5, 2, 3, 8), ValueError, r"qkv: expected \(B, N, 3, H, d\)"),
        (torch.zeros(2, 5, 3, 3, 8, dtype=torch.int64), TypeError, "qkv: expected floats"),
        (torch.zeros(2, 5, 3, 3, 0), ValueError, "d of at least 1"),
        ([1.0], TypeError, "pass a tensor"),
    ],
)
def test_wrong_arguments_get_one_line(qkv, error_type, words):
    with pytest.raises(error_type, match=words) as caught:
        qkv_attention(qkv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "error_type", "words"),
    [
        (torch.zeros(5, 5), ValueError, r"bias: expected shape \(H, N, N\)"),
        (torch.zeros(2, 5, 5), ValueError, r"bias: expected shape \(H, N, N\) = \(3, 5, 5\), got \(2, 5, 5\)"),
        (torch.zeros(3, 5, 5, dtype=torch.bool), TypeError, "bias: expected floats"),
        (1.0, TypeError, "pass a tensor"),
    ],
)
def test_a_wrong_bias_gets_one_line(bias, error_type, words):
    with pytest.raises(error_type, match=words) as caught:
        qkv_attention(torch.zeros(1, 5, 3, 3, 8), bias)
    assert "\n" not in str(caught.value)
