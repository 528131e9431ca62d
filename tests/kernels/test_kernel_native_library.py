"""The library of the native kernels: threads, torch.library and torch.compile, how it is found, instruction sets."""

import ctypes
import os
import pathlib
import subprocess
import sys

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import cases, dispatch, native_library
from made_up import NATIVE, bytes_of, permutations, random
from recorder import Recorder
from torch._dynamo.testing import CompileCounterWithBackend

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not NATIVE, reason=dispatch.load("gather", "native"))
# One case of each op and dtype: enough for compile and opcheck, which take a second each.
FEW = {}
# Where the reference computes other dtypes, on CPUs.
LOW_ALONE = {"activation", "qkv"}
for op in NATIVE:
    for case in cases.load(op)[0]:
        is_native = op not in LOW_ALONE or "bfloat16" in case.name
        if is_native and all(t.numel() for t in cases.flatten(case.inputs(CPU)) if isinstance(t, torch.Tensor)):
            FEW.setdefault((op, case.function, case.name.rpartition("_")[2]), case)
FEW_CASES = [pytest.param(case, id=f"{op}-{case.function}-{case.name}") for (op, *_), case in FEW.items()]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "native")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_native_runs_by_default(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE)
    assert {op for op, backend in fk.chosen("cpu").items() if backend == "native"} == set(NATIVE)


# Threads.


@pytest.mark.parametrize("case", FEW_CASES)
def test_results_do_not_depend_on_the_number_of_threads(case, threads):
    if case.function == "depthwise_patches":
        pytest.skip("its sums over the batch are cut by the number of threads")
    results, products = [], []
    for count in (1, 2, 3):
        threads(count)
        results.append(cases.call(cases.public(case), case, case.inputs(CPU)))
        products.append(random(7, 7) @ random(7, 100))
    if case.function == "contrastive_loss" and not all(torch.equal(product, products[0]) for product in products):
        pytest.skip("torch's small products depend on the number of threads: MKL on AMD's CPUs")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_batches_are_split_over_threads(threads):
    """Enough work for every worker: the case above may be too small to be split."""
    images, ids = bytes_of(96, 3, 40, 40), permutations(96, 25)
    inputs = [
        lambda: fk.shift_flip_jitter(images, size=(32, 32), blur_sigma=torch.full((96,), 1.5)),
        lambda: fk.patchify_gather(images, ids, 8, mean=(0.5,) * 3, std=(0.2,) * 3),
        lambda: fk.masked_pixel_loss(random(96, 25, 192), images, ids, 8, mean=None, std=None),
        lambda: fk.gather_tokens(random(96, 25, 300), ids),
        lambda: fk.restore_tokens(random(96, 9, 300), random(300), random(26, 300), ids),
        lambda: torch.cat([t.flatten() for t in fk.random_masking(torch.tensor([1, 2]), torch.arange(500), 49, 12)]),
        lambda: fk.uniform(torch.tensor([1, 2]), torch.arange(500), 3, 100),
        lambda: fk.topk_attention(*random(3, 4, 4, 100, 16), 20),
        lambda: fk.add_layer_norm(random(700, 3, 100), None, random(100)),
        lambda: fk.contrastive_loss(random(300, 8), random(400, 8), temperature=0.5),
    ]
    for function in inputs:
        threads(1)
        alone = function()
        threads(3)
        assert torch.equal(function(), alone)


# torch.library and torch.compile.


@pytest.mark.parametrize("case", FEW_CASES)
def test_opcheck(case):
    with Recorder() as recorder:
        cases.call(cases.public(case), case, case.inputs(CPU))
    assert recorder.calls
    for function, args in recorder.calls:
        is_input = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()  # noqa: E731
        args = cases.map_tensors(args, lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t)
        if case.grads and "backward" not in str(function):
            args = [a.requires_grad_() if is_input(a) and a.numel() else a for a in args]
        torch.library.opcheck(
            function, tuple(args), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


@pytest.mark.parametrize("case", FEW_CASES)
def test_compiled_as_one_graph(case):
    torch._dynamo.reset()
    compiled = torch.compile(cases.public(case), fullgraph=True, backend="aot_eager")
    eager = cases.call(cases.public(case), case, case.inputs(CPU))
    got = cases.call(compiled, case, case.inputs(CPU))
    assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))


def test_compiled_with_dynamic_sizes_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(images, pred, x, ids, token, pos):
        patches = fk.patchify_gather(images, ids, 4, mean=(0.5,) * 3, std=(0.2,) * 3)
        loss = fk.masked_pixel_loss(pred, images, ids, 4, mean=None, std=None)
        return fk.gather_tokens(fk.restore_tokens(x, token, pos, ids), ids).sum() * loss + patches.mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    # Sizes that differ from each other: those that are equal at first are taken for the same.
    for batch, side, width in ((4, 5, 28), (6, 7, 12), (2, 6, 7)):
        count = side * side
        images, ids = bytes_of(batch, 3, 4 * side, 4 * side), permutations(batch, count)
        inputs = [
            random(batch, count, 48),
            random(batch, 1 + count // 2, width),
            random(width),
            random(1 + count, width),
        ]
        results = []
        for function in (step, compiled):
            pred, x, token, pos = (t.clone().requires_grad_() for t in inputs)
            out = function(images, pred, x, ids, token, pos)
            results.append([out.detach(), *torch.autograd.grad(out, (pred, x, token, pos))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


# How the library is found.


def test_library_is_missing(monkeypatch):
    native_library.library.cache_clear()
    monkeypatch.setattr(native_library, "candidates", lambda: [pathlib.Path("nowhere/_native_default.so")])
    with pytest.raises(ImportError, match=r"no _native_default.so in .*fastmim_kernels; install fastmim where"):
        native_library.library()
    native_library.library.cache_clear()


def test_library_built_from_other_sources_is_refused(monkeypatch):
    if not (pathlib.Path(native_library.__file__).resolve().parent.parent / "csrc").is_dir():
        pytest.skip("an installed package has no sources to compare with")
    native_library.library.cache_clear()
    monkeypatch.setattr(native_library, "sources_digest", lambda folder: "0" * 64)
    with pytest.raises(ImportError, match="was built from other sources than"):
        native_library.library()
    native_library.library.cache_clear()


def test_function_that_the_library_lacks_is_an_import_error():
    with pytest.raises(ImportError, match="has no function no_such_function: it was built from other sources"):
        native_library.function("no_such_function")


def test_wrong_number_of_arguments_is_noticed():
    with pytest.raises(TypeError):
        native_library.function("gather_tokens")(1, 2, 3)


def test_threads_are_torchs_own():
    """One OpenMP runtime in the process: the library asks for none, and uses the functions that torch has loaded."""
    addresses = native_library._openmp()
    if addresses[0] is None:
        pytest.skip("torch has no OpenMP runtime with GOMP_parallel: kernels run on one thread")
    name = next(path for path in native_library.candidates() if path.exists())
    assert b"libgomp" not in name.read_bytes()
    count = ctypes.CFUNCTYPE(ctypes.c_int)(addresses[2])
    assert count() == 1  # outside of a parallel region


@pytest.mark.parametrize("granted", [True, False])
def test_a_system_that_denies_tiles_gets_products_by_vectors(granted, monkeypatch):
    for name, answer in (("_is_avx512_bf16_supported", True), ("_is_amx_tile_supported", True), ("_init_amx", granted)):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert native_library.candidates()[0].name == ("_native_amx.so" if granted else "_native_bf16.so")


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "bf16"])
def test_other_instruction_sets_are_right_as_well(capability):
    """Every small case once more, in a process for which torch reports less than the machine has."""
    sets = ["default", "avx2", "avx512", "bf16", "amx"]
    best = native_library.library()._name.rpartition("_native_")[2].removesuffix(".so")
    if sets.index(capability) >= sets.index(best):
        pytest.skip(f"the best library for this machine is {best}")
    script = (
        "import torch\n"
        "torch.cpu._is_amx_tile_supported = lambda: False\n"
        f"torch.cpu._is_avx512_bf16_supported = lambda: {capability == 'bf16'}\n"
        "from fastmim_kernels import cases, dispatch, native_library\n"
        f"assert native_library.library()._name.endswith('_native_{capability}.so')\n"
        "for op in dispatch.ops():\n"
        "    for case in cases.load(op)[0] if not dispatch.load(op, 'native') else ():\n"
        "        assert cases.error(case, torch.device('cpu')) <= case.tolerance, (op, case.name)\n"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability.replace("bf16", "avx512"), dispatch.VARIABLE: ""}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
