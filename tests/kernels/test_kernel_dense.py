"""The linear layer: gradients against float64, odd sizes, many rows, autocast, threads, frozen parts, errors."""

import pytest
import torch
from fastmim_kernels import bias_gelu, dense, dispatch, gelu_linear, linear
from fastmim_kernels.dense import rounded_weights
from torch.nn import functional as F

BACKENDS = ["reference", *(["native"] if not dispatch.load("dense", "native") else [])]
# (rows, inputs, outputs): more rows than a slice of 1024, sizes below and above the blocks of 32.
SIZES = [(50, 64, 96), (1, 5, 3), (2090, 33, 65), (1024, 32, 32), (37, 300, 7)]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    return request.param


def tensors(rows, inputs, outputs, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (outputs,), (rows, outputs)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def gradients(function, x, weight, bias, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    function(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]


def error(ours, exact):
    return float((ours.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_result_and_gradients_agree_with_products_in_float64(backend, size):
    x, weight, bias, grad = tensors(*size)
    exact = x.double() @ weight.double().T + bias.double()
    assert error(linear(x, weight, bias), exact) <= 4e-3
    expected = (grad.double() @ weight.double(), grad.double().T @ x.double(), grad.double().sum(0))
    for ours, slow in zip(gradients(linear, x, weight, bias, grad), expected):
        assert error(ours, slow) <= 4e-3


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernel")
@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("function", [linear, gelu_linear])
def test_products_of_ours_and_of_torch_agree_with_float64(monkeypatch, function, is_own):
    """A CPU takes the faster of the two: ours by vectors, torch's on tiles."""
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    monkeypatch.setattr(dense, "HAS_OWN_PRODUCTS", is_own)
    x, weight, bias, grad = tensors(301, 37, 70)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    before = F.gelu(exact[0]) if function is gelu_linear else exact[0]
    result = F.linear(before, *exact[1:])
    result.backward(grad.double())
    assert error(function(x, weight, bias), result.detach()) <= 4e-3
    for ours, slow in zip(gradients(function, x, weight, bias, grad), exact):
        assert error(ours, slow.grad) <= 6e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_gradient_of_float32_parameters_under_autocast(backend, size):
    """The tiles sum bfloat16 products in float32 and round nothing afterwards."""
    x, weight, bias, grad = tensors(*size)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(linear, x.float(), weight.float(), bias.float(), grad)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    limit = 1e-6 if backend == "native" else 4e-3
    assert error(ours[1], grad.double().T @ x.double()) <= limit
    assert error(ours[2], grad.double().sum(0)) <= limit


def test_float32_is_torchs_own(backend):
    x, weight, bias, grad = tensors(40, 24, 12, torch.float32)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    for ours, theirs in zip(gradients(linear, x, weight, bias, grad), gradients(F.linear, x, weight, bias, grad)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("has_bias", [True, False])
def test_result_without_gradients_is_that_with_them(backend, has_bias):
    x, weight, bias, _ = tensors(5, 24, 12)
    weight.requires_grad_()
    bias = bias if has_bias else None
    expected = linear(x, weight, bias)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), expected)


def test_rounded_weights_are_taken_for_the_weights_product(backend):
    """A copy that differs shows that it was taken; the gradient is the weight's all the same."""
    x, weight, bias, grad = tensors(5, 24, 12)
    weight = weight.float().requires_grad_()
    with rounded_weights({weight: 2 * weight.detach().bfloat16()}), torch.autocast("cpu", torch.bfloat16):
        doubled = linear(x, weight, bias)
        other = linear(x, weight.detach().clone().requires_grad_(), bias)
    with torch.autocast("cpu", torch.bfloat16):
        plain = linear(x, weight, bias)
    assert torch.equal(other, plain)
    assert (
        error(doubled, ((2 if backend == "native" else 1) * weight.double() @ x.double().T).T + bias.double()) <= 4e-3
    )
    doubled.backward(grad)
    assert error(weight.grad, grad.double().T @ x.double()) <= 4e-3


def test_parts_that_need_no_gradient(backend):
    x, weight, bias, grad = tensors(40, 24, 12)
    weight.requires_grad_()
    linear(x, weight, bias).backward(grad)
    assert x.grad is None and bias.grad is None
    assert error(weight.grad, grad.double().T @ x.double()) <= 4e-3
    x.requires_grad_()
    linear(x, weight.detach(), None).backward(grad)
    assert error(x.grad, grad.double() @ weight.detach().double()) <= 4e-3


def test_any_number_of_threads_gives_the_same_bits(backend):
    if backend == "reference":
        pytest.skip("torch does not promise it")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(linear, *tensors(1500, 100, 260)))
            # torch does not promise it for its products, which tiles take.
            results[-1][0] = linear(*tensors(1500, 100, 260)[:3]) if dense.HAS_OWN_PRODUCTS else torch.zeros(())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        (dict(x=torch.zeros(3, 4, dtype=torch.int64)), TypeError, "x: expected floats"),
        (dict(x=1.0), TypeError, "x: expected floats"),
        (dict(weight=torch.zeros(5, 3)), ValueError, r"weight: expected shape \(O, 4\)"),
        (dict(weight=torch.zeros(4)), ValueError, "weight: expected shape"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias: expected shape \(5,\)"),
    ],
)
def test_wrong_arguments_get_one_line(change, error_type, words):
    named = dict(x=torch.zeros(3, 4), weight=torch.zeros(5, 4), bias=torch.zeros(5)) | change
    with pytest.raises(error_type, match=words) as caught:
        linear(**named)
    assert "\n" not in str(caught.value)


# ---- behind a GELU


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_behind_gelu_result_and_gradients_agree_with_float64(backend, size):
    x, weight, bias, grad = tensors(*size)
    x *= 2
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = F.linear(leaves[0] * torch.special.ndtr(leaves[0]), *leaves[1:])
    exact.backward(grad.double())
    assert error(gelu_linear(x, weight, bias), exact.detach()) <= 4e-3
    for ours, leaf in zip(gradients(gelu_linear, x, weight, bias, grad), leaves):
        assert error(ours, leaf.grad) <= 4e-3


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_gelu_is_the_two_one_after_the_other(backend, dtype, has_bias):
    """Bit for bit, also without gradients, and with some of them alone."""
    x, weight, bias, grad = tensors(1100, 40, 24, dtype)

    def both(x, weight, bias):
        return linear(bias_gelu(x), weight, bias)

    def call(function):
        return gradients(lambda x, w, b: function(x, w, b if has_bias else 0 * b), x, weight, bias, grad)

    for ours, theirs in zip(call(gelu_linear), call(both)):
        assert torch.equal(ours, theirs)
    weight.requires_grad_()
    expected = both(x, weight, bias)
    assert torch.equal(gelu_linear(x, weight, bias), expected)
    with torch.no_grad():
        assert torch.equal(gelu_linear(x, weight, bias), expected)
    gelu_linear(x, weight, bias).backward(grad)
    assert x.grad is None and weight.grad.isfinite().all()


def test_behind_gelu_keeps_its_input_alone(backend):
    if backend == "reference":
        pytest.skip("torch keeps what GELU gives, too")
    x, weight, bias, _ = tensors(50, 64, 96)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gelu_linear(x.requires_grad_(), weight.requires_grad_(), bias)
    assert sorted(kept) == sorted([x.shape, weight.shape])


def test_gelu_of_every_bfloat16_and_its_slope_are_rounded_once(backend):
    if backend == "reference":
        pytest.skip("torch's tails are zero, and half of its largest numbers overflow")
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].requires_grad_()
    got = bias_gelu(x)
    got.sum().backward()
    exact = x.detach().double()
    below, density = torch.special.erfc(-exact * 0.5**0.5) / 2, (-(exact**2) / 2).exp() / (2 * torch.pi) ** 0.5
    for ours, expected in ((got.detach(), exact * below), (x.grad, below + exact * density)):
        # Half a unit in the last place, and 2 % of that; below 1e-30 zero will do.
        assert (ours.double() - expected).abs().le(1.02 * 2.0**-8 * expected.abs() + 1e-30).all()


def test_gelu_of_a_number_does_not_depend_on_those_beside_it(backend):
    """Nor on its place in a vector, or in the part of a thread: all numbers, in several orders."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([x[x.isfinite()]] * 2)
    grad = torch.linspace(-3, 3, len(x)).bfloat16()

    def both(order):
        leaf = x[order].requires_grad_()
        y = bias_gelu(leaf)
        y.backward(grad[order])
        return torch.stack([y.detach(), leaf.grad]).view(torch.int16)

    in_order = both(torch.arange(len(x)))
    for count in (len(x), 77_777, 33):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(count))[:count]
        assert torch.equal(both(order), in_order[:, order])


def test_gelu_of_what_is_no_number(backend):
    x = torch.tensor([torch.nan, torch.inf], dtype=torch.bfloat16, requires_grad=True)
    out = bias_gelu(x)
    assert out[0].isnan()
    assert backend == "reference" or out[1] == torch.inf, "torch gives what is no number"
    out.sum().backward()
    assert x.grad[0].isnan()
