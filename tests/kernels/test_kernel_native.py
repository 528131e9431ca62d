"""Native CPU kernels: precision against torch's own, any strides, threads, compile, errors, and the library itself."""

import ctypes
import os
import pathlib
import subprocess
import sys

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import cases, dispatch, native_library
from recorder import Recorder
from torch._dynamo.testing import CompileCounterWithBackend

CPU = torch.device("cpu")
NATIVE = [op for op in dispatch.ops() if not dispatch.load(op, "native")]
pytestmark = pytest.mark.skipif(not NATIVE, reason=dispatch.load("gather", "native"))
# One case of each op and dtype: enough for compile and opcheck, which take a second each.
FEW = {}
for op in NATIVE:
    for case in cases.load(op)[0]:
        if all(t.numel() for t in cases.flatten(case.inputs(CPU)) if isinstance(t, torch.Tensor)):
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


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def permutations(batch, count, seed=0):
    return torch.rand((batch, count), generator=torch.Generator().manual_seed(seed)).argsort(1)


def test_native_runs_by_default(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE)
    assert {op for op, backend in fk.chosen("cpu").items() if backend == "native"} == set(NATIVE)


# Precision: not worse than torch's own in the same dtype, by the rule error <= 1.5 x torch's error + one last bit.

OPS = {
    "patchify_gather": lambda dtype: dict(
        images=bytes_of(2, 3, 21, 35), ids=permutations(2, 15)[:, :7], patch_size=7, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25), dtype=dtype,
    ),
    "gather_tokens": lambda dtype: dict(x=random(2, 9, 37, dtype=dtype), ids=permutations(2, 9)[:, :4]),
    "restore_tokens": lambda dtype: dict(
        x=random(2, 6, 37, dtype=dtype), mask_token=random(37, seed=1, dtype=dtype), pos=random(14, 37, seed=2, dtype=dtype),
        ids_restore=permutations(2, 13),
    ),
    "masked_pixel_loss": lambda dtype: dict(
        pred=random(3, 5, 75, dtype=dtype), images=bytes_of(3, 3, 20, 15), ids_masked=permutations(3, 12)[:, :5],
        patch_size=5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25),
    ),
    "contrastive_loss": lambda dtype: dict(
        q=random(5, 37, dtype=dtype) / 6, k=random(300, 37, seed=1, dtype=dtype) / 6, offset=131, temperature=0.07,
        label_smoothing=0.1,
    ),
    "topk_attention": lambda dtype: dict(
        q=random(2, 3, 100, 20, dtype=dtype), k=random(2, 3, 100, 20, seed=1, dtype=dtype),
        v=random(2, 3, 100, 20, seed=2, dtype=dtype), topk=23,
    ),
    "add_layer_norm": lambda dtype: dict(
        x=random(3, 11, 129, dtype=dtype), residual=random(3, 11, 129, seed=1, dtype=dtype),
        weight=random(129, seed=2, dtype=dtype), bias=random(129, seed=3, dtype=dtype),
        scale=random(129, seed=4, dtype=dtype), row_scale=torch.tensor([0.0, 1.25, 1.25]), prenorm=True,
    ),
}  # fmt: skip
SOURCES = {
    "patchify_gather": (), "gather_tokens": ("x",), "restore_tokens": ("x", "mask_token", "pos"),
    "masked_pixel_loss": ("pred",), "contrastive_loss": ("q", "k"), "topk_attention": ("q", "k", "v"),
    "add_layer_norm": ("x", "residual", "weight", "bias", "scale"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("function", OPS)
def test_error_is_not_above_torchs_own(function, dtype, monkeypatch):
    case = cases.Case("", function, lambda _: OPS[function](dtype), grads=SOURCES[function])
    ours = cases.call(cases.public(case), case, case.inputs(CPU))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    theirs = cases.call(cases.public(case), case, case.inputs(CPU))
    truth = cases.call(cases.public(case), case, cases.upcast(case.inputs(CPU)))
    for got, torchs, exact in zip(ours, theirs, truth, strict=True):
        assert got.dtype == torchs.dtype and got.shape == torchs.shape
        scale = exact.double().abs().max().clamp_min(1e-30)
        error, allowed = ((t.double() - exact.double()).abs().max() / scale for t in (got, torchs))
        assert error <= 1.5 * allowed + torch.finfo(got.dtype).eps


def test_half_precision_is_converted_as_torch_does():
    """All 65536 float16 and bfloat16 numbers to float32, and floats of every size, ties and NaN back."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 256)
        nothing = {"mask_token": torch.zeros(256), "pos": torch.full((256, 256), -0.0), "num_prefix": 0}
        wide = fk.restore_tokens(numbers, ids_restore=torch.arange(256)[None], **nothing)
        torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)

        bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
        ties = torch.arange(0, 2**16, dtype=torch.int64) << 16 | (0x8000 if dtype == torch.bfloat16 else 0x1000)
        floats = torch.cat([bits, ties])[: 128 * 1000].to(torch.int32).view(torch.float32).view(1, -1, 128)
        tokens = floats.shape[1]
        zero = fk.patchify_gather(floats.permute(0, 2, 1)[..., None], torch.arange(tokens)[None], 1, dtype=dtype)
        torch.testing.assert_close(zero, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


# Strides, sizes and addresses.


def test_strided_inputs_equal_contiguous_ones():
    images = bytes_of(2, 3, 24, 20)
    window = dict(size=(16, 16), offset=torch.tensor([[8, 4], [0, 1]]), flip=torch.tensor([True, False]))
    variants = [
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([images, images], -1)[..., 1],
        images.flip(0).contiguous().as_strided(images.shape, images.stride())[[1, 0]],
    ]
    views = fk.shift_flip_jitter(images, **window)
    patches = fk.patchify_gather(images, None, 8, **window)
    for strided in variants:
        assert torch.equal(fk.shift_flip_jitter(strided, **window), views)
        assert torch.equal(fk.patchify_gather(strided, None, 8, **window), patches)
        assert torch.equal(fk.patchify_gather(strided / 255, None, 8, **window), patches)

    x, ids = random(3, 10, 16), permutations(3, 9)
    for strided in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], 2)[..., :16],
        x[:1].expand(3, -1, -1),
    ):
        assert torch.equal(fk.gather_tokens(strided[:, 1:], ids), fk.gather_tokens(strided[:, 1:].contiguous(), ids))
        restored = fk.restore_tokens(strided[:, :5], x[0, 0], x[0], ids)
        assert torch.equal(restored, fk.restore_tokens(strided[:, :5].contiguous(), x[0, 0], x[0], ids))


def test_gradients_of_expanded_and_transposed_gradients():
    x, ids = random(2, 6, 8).requires_grad_(), permutations(2, 6)[:, :4]
    for grad in (torch.ones(1).expand(2, 4, 8), random(2, 8, 4).transpose(1, 2)):
        (got,) = torch.autograd.grad(fk.gather_tokens(x, ids), x, grad)
        expected = torch.zeros(2, 6, 8).scatter_(1, ids[:, :, None].expand(-1, -1, 8), grad)
        assert torch.equal(got, expected)


def test_ids_that_repeat_add_up_in_the_gradient():
    x = random(1, 5, 33).requires_grad_()
    ids = torch.tensor([[2, 4, 2, 2]])
    grad = random(1, 4, 33, seed=1)
    (got,) = torch.autograd.grad(fk.gather_tokens(x, ids), x, grad)
    expected = torch.zeros(1, 5, 33).index_add_(1, ids[0], grad)
    torch.testing.assert_close(got, expected)


def test_addresses_beyond_2_to_the_31():
    """Rows and images that lie more than 2**31 elements apart, in memory of which only those pages are touched."""
    far = 2**31 + 5
    try:
        memory = torch.empty(2 * far + 64, dtype=torch.uint8)
    except RuntimeError as e:
        pytest.skip(f"no 4 GB of address space: {e}")
    images = memory.as_strided((3, 1, 4, 4), (far, 16, 4, 1))
    expected = bytes_of(3, 1, 4, 4)
    images.copy_(expected)
    assert torch.equal(fk.patchify_gather(images, None, 2), fk.patchify_gather(expected, None, 2))
    assert torch.equal(fk.shift_flip_jitter(images, size=(4, 4)), expected / 255)

    tokens = memory[: (far // 2) * 4].view(torch.bfloat16).as_strided((1, 3, 4), (1, far // 2, 1))
    tokens.copy_(random(1, 3, 4))
    assert torch.equal(fk.gather_tokens(tokens, torch.tensor([[2, 0]])), tokens[:, [2, 0]])


# Threads.


@pytest.mark.parametrize("case", FEW_CASES)
def test_results_do_not_depend_on_the_number_of_threads(case, threads):
    if case.function == "depthwise_patches":
        pytest.skip("its sums over the batch are cut by the number of threads")
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(cases.call(cases.public(case), case, case.inputs(CPU)))
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


# Gradients: weights of the loss, several backward passes, second derivatives.


def loss_inputs(dtype=torch.float32):
    inputs = OPS["masked_pixel_loss"](dtype)
    return inputs.pop("pred").requires_grad_(), inputs


@pytest.mark.parametrize("weight", [1.0, 0.3, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_weighted_loss_has_a_gradient_rounded_once(weight, dtype):
    pred, inputs = loss_inputs(dtype)
    (got,) = torch.autograd.grad(weight * fk.masked_pixel_loss(pred, **inputs), pred)
    wide = pred.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(weight * fk.masked_pixel_loss(wide, **inputs), wide)
    info = torch.finfo(dtype)
    # float32: the target's statistics are float32 as well. float16: small gradients are subnormal.
    atol = 1e-6 * float(exact.abs().max()) + info.smallest_normal * info.eps
    torch.testing.assert_close(got.double(), exact, rtol=max(info.eps, 1e-6), atol=atol)


def test_loss_backward_can_be_repeated_and_added_up():
    pred, inputs = loss_inputs()
    loss = fk.masked_pixel_loss(pred, **inputs)
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    once = once.clone()
    for passes in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(pred.grad, passes * once)
    assert torch.equal(torch.autograd.grad(loss, pred)[0], once)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (f, n)
        for f in ("masked_pixel_loss", "contrastive_loss", "topk_attention", "add_layer_norm")
        for n in SOURCES[f][:1]
    ],
)
def test_second_derivatives_are_refused_not_wrong(function, name):
    inputs = OPS[function](torch.float32)
    inputs.pop("prenorm", None)
    source = inputs[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{function}: .*FASTMIM_KERNELS=reference"):
        (grad,) = torch.autograd.grad(getattr(fk, function)(**inputs).sum(), source, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("function", ["gather_tokens", "restore_tokens"])
def test_linear_ops_have_second_derivatives(function):
    inputs = OPS[function](torch.float32)
    sources = [inputs[name].requires_grad_() for name in SOURCES[function]]
    out = getattr(fk, function)(**inputs)
    weight = random(*out.shape, seed=9).requires_grad_()
    grads = torch.autograd.grad(out, sources, weight, create_graph=True)
    directions = [random(*g.shape, seed=10 + i) for i, g in enumerate(grads)]
    (got,) = torch.autograd.grad(grads, weight, directions)
    # A linear op: its gradient, applied to directions, is the op of those directions.
    expected = getattr(fk, function)(**(inputs | dict(zip(SOURCES[function], directions, strict=True))))
    torch.testing.assert_close(got, expected)


# Top-K selection on rows where a search can go wrong.


@pytest.mark.parametrize("kind", ["ties", "two values", "tiny and huge", "infinite", "signed zeros"])
@pytest.mark.parametrize("topk", [1, 7, 39, 40])
def test_topk_selects_what_sorting_selects(kind, topk):
    scores = random(1, 2, 40, 40)
    scores = {
        "ties": scores.mul(2).round(),
        "two values": scores.sign(),
        "tiny and huge": scores * 10 ** (15 * random(1, 2, 40, 40, seed=1)).clamp(-30, 30),
        "infinite": torch.where(scores > 1.5, torch.inf, torch.where(scores < -1.5, -torch.inf, scores)),
        "signed zeros": torch.where(scores > 0.5, scores, torch.where(scores > 0, 0.0, -0.0)),
    }[kind]
    # With k the identity, the scores are q itself.
    q, k = scores, torch.eye(40).expand(1, 2, -1, -1).contiguous()
    if kind == "infinite":
        q = scores.nan_to_num(posinf=3e38, neginf=-3e38)
    v, labels = random(1, 2, 40, 40, seed=2), torch.zeros(1, 40, dtype=torch.int64)
    out, kept = fk.topk_attention(q, k, v, topk, num_prefix=0, scale=1.0, labels=labels)
    least = q.sort(-1, descending=True).values[..., topk - 1 : topk]
    assert torch.equal(kept, (q >= least).sum(-1))
    weights = q.double().masked_fill(q < least, -torch.inf).softmax(-1)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=1e-5, atol=1e-5)


def test_topk_of_many_short_rows_and_few_long_ones_equals_reference(monkeypatch):
    """Blocks of several images, and of some heads of one image."""
    for batch, heads, length in ((70, 3, 50), (1, 3, 600)):
        qkv = random(3, batch, length, heads, 8).transpose(2, 3)
        labels = permutations(batch, length - 1) % 3
        results = []
        for backend in ("native", "reference"):
            monkeypatch.setenv(dispatch.VARIABLE, backend)
            q, k, v = (t.detach().clone().requires_grad_() for t in qkv)
            out, kept = fk.topk_attention(q, k, v, length // 4, labels=labels)
            results.append([out, kept, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Errors, and the library.


def test_ids_out_of_range_raise_in_the_kernel_too():
    """Under torch.compile the public functions look at no values."""
    x, ids = random(2, 5, 4), torch.tensor([[0, 4], [5, 1]])
    for bad in (ids, -ids):
        with pytest.raises(IndexError, match="gather_tokens: expected ids and offsets inside"):
            torch.ops.fastmim.gather_tokens(x, bad)
        with pytest.raises(IndexError):
            torch.ops.fastmim.gather_tokens_backward(random(2, 2, 4), bad, 5)
        with pytest.raises(IndexError):
            torch.ops.fastmim.patchify_gather(
                bytes_of(2, 1, 2, 5), bad, 1, None, None, [1, 5], None, None, torch.float32
            )
    with pytest.raises(IndexError):
        offset = torch.tensor([[0, 0], [0, 2]])
        torch.ops.fastmim.patchify_gather(
            bytes_of(2, 1, 2, 5), None, 1, None, None, [1, 4], offset, None, torch.float32
        )


def test_float64_and_integers_are_computed_by_the_reference():
    x, ids = torch.arange(12).view(1, 4, 3), torch.tensor([[3, 1]])
    assert fk.gather_tokens(x, ids).tolist() == [[[9, 10, 11], [3, 4, 5]]]
    assert fk.gather_tokens(x.double(), ids).dtype == torch.float64
    assert fk.patchify_gather(bytes_of(1, 3, 4, 4), None, 2, dtype=torch.float64).dtype == torch.float64


def test_images_that_need_a_gradient_get_one():
    images = torch.rand(1, 1, 2, 2).requires_grad_()
    fk.patchify_gather(images, torch.tensor([[3]]), 1).sum().backward()
    assert images.grad.flatten().tolist() == [0, 0, 0, 1]


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


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_are_right_as_well(capability):
    """Every small case once more, in a process for which torch reports less than the machine has."""
    current = torch.backends.cpu.get_cpu_capability()
    if current not in ("AVX2", "AVX512") or capability.upper() == current:
        pytest.skip(f"this machine has {current}")
    script = (
        "import torch; from fastmim_kernels import cases, dispatch, native_library\n"
        f"assert native_library.library()._name.endswith('_native_{capability}.so')\n"
        "for op in dispatch.ops():\n"
        "    for case in cases.load(op)[0] if not dispatch.load(op, 'native') else ():\n"
        "        assert cases.error(case, torch.device('cpu')) <= case.tolerance, (op, case.name)\n"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, dispatch.VARIABLE: ""}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
