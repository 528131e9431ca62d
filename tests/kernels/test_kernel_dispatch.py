"""Choice of the backend: default, forced by FASTMIM_KERNELS, absent, broken."""

import importlib.util
import sys

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import dispatch

X, IDS = torch.arange(12.0).view(1, 4, 3), torch.tensor([[2, 0]])


@pytest.fixture
def add_file(tmp_path, monkeypatch):
    """Puts a file into the folder of op ``gather``, before the one of that name that may be there, for one test."""
    folder = "fastmim_kernels.gather"

    class Finder:
        # First of all finders: that of an editable install knows the real files and asks no path.
        @staticmethod
        def find_spec(name, path=None, target=None):
            file = tmp_path / f"{name.rpartition('.')[2]}.py"
            is_added = name.rpartition(".")[0] == folder and file.exists()
            return importlib.util.spec_from_file_location(name, file) if is_added else None

    loaded, modules = dict(dispatch.LOADED), {}

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
        modules[f"{folder}.{name}"] = sys.modules.pop(f"{folder}.{name}", None)
        dispatch.LOADED.clear()
        dispatch._missing_when.cache_clear()

    yield add
    for name, module in modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    dispatch.LOADED.clear()
    dispatch.LOADED.update(loaded)
    dispatch._missing_when.cache_clear()


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_chosen_names_an_available_backend_for_every_op():
    assert set(fk.chosen("cpu")) == set(dispatch.ops())
    assert all(fk.backends()[backend][0] for backend in fk.chosen("cpu").values())


def test_backends_give_a_reason():
    found = fk.backends()
    assert set(found) == {"reference", "native", "triton"}
    assert found["reference"][0]
    assert all(isinstance(available, bool) and reason for available, reason in found.values())


def test_states_say_what_computes_each_op_and_why_it_is_torch(monkeypatch):
    states = fk.states()
    assert set(states) == set(dispatch.ops())
    assert "(the folder resize/ has no native.py)" in states["resize"]
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert all(state.count("reference") == 2 for state in fk.states().values())


def test_forced_reference_is_read_at_call_time(monkeypatch):
    for value in ("", "reference"):
        monkeypatch.setenv(dispatch.VARIABLE, value)
        assert fk.gather_tokens(X, IDS)[0, 0, 0] == 6
    assert set(fk.chosen("cpu").values()) == {"reference"}


def test_forced_unknown_backend_raises(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "trition")
    with pytest.raises(
        RuntimeError, match=r"FASTMIM_KERNELS: expected one of reference, native, triton, got 'trition'"
    ):
        fk.gather_tokens(X, IDS)


def test_forced_triton_on_cpu_tensors_raises_with_op_backend_reason_and_fix(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(
        RuntimeError, match=r"gather: backend 'triton' is forced .* computes on cuda tensors.*; unset FASTMIM_KERNELS"
    ):
        fk.gather_tokens(X, IDS)
    with pytest.raises(RuntimeError, match="triton"):
        fk.chosen("cpu")


def test_forced_backend_without_file_raises(monkeypatch):
    if importlib.util.find_spec("fastmim_kernels.ema.native"):
        pytest.skip("ema has a native implementation")
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    with pytest.raises(RuntimeError, match=r"ema: backend 'native' is forced .* has no native.py"):
        fk.ema_update([torch.ones(1)], [torch.ones(1)], 0.5)


def test_a_new_file_is_enough_to_be_found(add_file, monkeypatch):
    add_file("native", "def gather_tokens(x, ids):\n    return x.new_full((1, 2, 3), 99)\n")
    assert (fk.gather_tokens(X, IDS) == 99).all()
    assert fk.chosen("cpu")["gather"] == "native"
    assert fk.backends()["native"][0] and "gather" in fk.backends()["native"][1]
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert not (fk.gather_tokens(X, IDS) == 99).any()


def test_triton_file_serves_cuda_and_the_interpreter_only(add_file, monkeypatch):
    add_file("kernel", "def gather_tokens(x, ids):\n    return x.new_full((1, 2, 3), 8)\n")
    assert fk.chosen("cuda")["gather"] == "triton"
    assert fk.chosen("cpu")["gather"] != "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert (fk.gather_tokens(X, IDS) == 8).all()


def test_file_that_does_not_import_is_reported_and_not_used(add_file, monkeypatch):
    add_file("native", "raise ImportError('no compiler was there')\n")
    assert fk.chosen("cpu")["gather"] == "reference"
    assert "no compiler was there" in fk.backends()["native"][1]
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    with pytest.raises(RuntimeError, match="no compiler was there"):
        fk.gather_tokens(X, IDS)


def test_dispatch_is_traced_by_compile_as_one_graph():
    compiled = torch.compile(fk.gather_tokens, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X, IDS), fk.gather_tokens(X, IDS))


def test_registered_ops_say_so_where_nothing_is_compiled(monkeypatch):
    """``fastmim::`` ops stand for compiled kernels; the functions fall back to torch."""
    monkeypatch.setattr(dispatch, "_missing", lambda op, backend, device_type: "it was not built")
    with pytest.raises(NotImplementedError, match=r"gather: expected a compiled kernel for cpu .*it was not built"):
        torch.ops.fastmim.gather_tokens(X, IDS)
    monkeypatch.setattr(dispatch, "backend_of", lambda op, device_type: "reference")
    assert fk.gather_tokens(X, IDS)[0, 0, 0] == 6


def test_registered_ops_are_named_like_the_functions():
    """Namespace fastmim:: holds at most one op for a function, and one for its gradient."""
    registered = {
        n.partition("::")[2].partition(".")[0] for n in torch._C._dispatch_get_all_op_names() if "fastmim::" in n
    }
    functions = {name for name in fk.__all__ if name[0].islower()} - {"backends", "chosen", "states"}
    # random_masking and cell_masking are one op: a patch is a cell of one. linear's result and the gradient of its input are
    # one op, too, and torch's on a CPU with tiles.
    assert {name.removesuffix("_backward") for name in registered} <= functions | {"draw_masks", "linear_product"}
    assert registered >= {"gather_tokens", "gather_tokens_backward", "draw_masks", "ema_update"}
