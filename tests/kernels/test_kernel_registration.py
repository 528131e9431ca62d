"""The short way past torch's dispatcher: the same numbers, and taken where nobody listens and tensors are no others'."""

import contextlib

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import cases, dispatch, registration
from made_up import NATIVE
from recorder import Recorder
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not NATIVE, reason=dispatch.load("gather", "native"))
CASES = [pytest.param(case, id=f"{op}-{case.name}") for op in NATIVE for case in cases.load(op)[0]]
X, IDS = torch.arange(24.0).view(2, 4, 3), torch.tensor([[2, 0], [3, 1]])


@pytest.fixture
def ways(monkeypatch):
    """Appends the name of what computes an op of ours at each call: "dispatcher", or "at once"."""
    seen = []
    short = registration._is_plain

    def is_plain(args):
        found = short(args)
        seen.append("at once" if found else "dispatcher")
        return found

    monkeypatch.setattr(registration, "_is_plain", is_plain)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_bits(case):
    """Results and gradients. Ops that write to their arguments have the dispatcher alone."""
    at_once = cases.call(cases.public(case), case, case.inputs(CPU))
    with Recorder() as recorder:
        dispatched = cases.call(cases.public(case), case, case.inputs(CPU))
    if not recorder.calls:
        pytest.skip("the reference computes it")
    assert len(at_once) == len(dispatched)
    for a, b in zip(at_once, dispatched, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_ordinary_tensors_go_at_once(ways):
    x = X.clone().requires_grad_()
    fk.gather_tokens(x, IDS).sum().backward()
    with torch.no_grad():
        fk.gather_tokens(torch.nn.Parameter(X.clone()), IDS)
    with torch.inference_mode():
        fk.gather_tokens(X.clone(), IDS)
    assert ways == ["at once"] * 4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_who_listens_hears_of_every_op(ways):
    x = X.clone().requires_grad_()

    def step():
        fk.gather_tokens(x, IDS).sum().backward()

    class Functions(TorchFunctionMode):
        heard = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.heard += "fastmim" in str(function)
            return function(*args, **(kwargs or {}))

    with Recorder() as recorder:
        step()
    assert [function.overloadpacket.__name__ for function, _ in recorder.calls] == [
        "gather_tokens", "gather_tokens_backward",
    ]  # fmt: skip
    with Functions() as functions:
        fk.gather_tokens(x, IDS)
    assert functions.heard == 1
    with torch.profiler.profile() as profile:
        step()
    names = {event.key for event in profile.key_averages()}
    assert {"fastmim::gather_tokens", "fastmim::gather_tokens_backward"} <= names
    assert "at once" not in ways
    weight = torch.ones(3)
    assert "fastmim.add_layer_norm" in make_fx(lambda t: fk.add_layer_norm(t, None, weight))(X).code
    assert "fastmim::add_layer_norm" in str(torch.jit.trace(lambda t: fk.add_layer_norm(t, None, weight), X).graph)


def test_a_view_that_negates_is_read_as_what_it_says(ways):
    negated = torch.complex(torch.zeros_like(X), X).conj().imag
    assert negated.is_neg() and torch.equal(fk.gather_tokens(negated, IDS), -fk.gather_tokens(X, IDS))
    assert ways == ["dispatcher", "at once"]


def test_zeros_that_take_no_place_are_zeros(ways):
    assert not fk.gather_tokens(torch._efficientzerotensor(X.shape), IDS).any()
    assert ways == ["dispatcher"]


def test_a_subclass_is_asked_and_given_back(ways):
    class Named(torch.Tensor):
        pass

    assert type(fk.gather_tokens(X.as_subclass(Named), IDS)) is Named
    assert ways == ["dispatcher"]


def test_tensors_of_no_memory_have_shapes():
    got = fk.add_layer_norm(X.to("meta"), None, torch.ones(3, device="meta"))
    assert got.device.type == "meta" and got.shape == X.shape
    assert not registration._is_plain((X.to("meta"), 1))


@pytest.mark.parametrize("listener", [contextlib.nullcontext, Recorder], ids=["at once", "dispatcher"])
def test_a_gradient_of_a_gradient_is_refused_either_way(listener):
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with listener():
        y = fk.add_layer_norm(x, None, weight)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="add_layer_norm"):
            grad.sum().backward()


def test_hooks_on_saved_tensors_see_what_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t.clone(), lambda t: t):
        x = X.clone().requires_grad_()
        fk.gather_tokens(x, IDS).sum().backward()
    assert kept == [IDS.shape]
    assert torch.equal(x.grad.sum((1, 2)), torch.tensor([6.0, 6.0]))
