"""The tests of the Triton kernels, which need TRITON_INTERPRET=1 before Triton is imported.

test_kernel_triton.py runs them in a process of their own; directly:
``TRITON_INTERPRET=1 FASTMIM_KERNELS=triton pytest tests/kernels/triton_cases.py``.
"""

import dataclasses
import inspect
import math
import pathlib

import fastmim_kernels as fk
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter
from fastmim_kernels import cases, dispatch, tuning
from recorder import Recorder

triton_interpreter.install()

CPU = torch.device("cpu")
PACKAGE = pathlib.Path(fk.__file__).parent
OPS = [op for op in dispatch.ops() if (PACKAGE / op / "kernel.py").exists()]
# What takes over two seconds in the interpreter; the same code runs on smaller sizes.
SLOW = {
    ("block_masks", "B3_grid14x14_M195_from16"),
    ("block_masks", "B2_grid1x9_M4_from1"),
    ("mixing", "G3_L196_M4_P1_D100_float32_float32"),
    ("patch_contrast", "G2_L196_D100_M4_t0.25_float32"),
    ("token_loss", "N300_D16_V100_chunkNone_bias_float32"),
    ("topk", "B2_H3_L196_K49_P1_d64_float32"),
    ("topk", "B2_H3_L196_K49_P1_d64_float32_counted"),
}
CASES = [(op, case) for op in OPS for case in cases.load(op)[0] if (op, case.name) not in SLOW]
IDS = [f"{op}-{case.function}-{case.name}" for op, case in CASES]


def reachable(case: cases.Case) -> cases.Case:
    """The case, with its inputs known to the interpreter even where a kernel gets only their addresses."""

    def inputs(device):
        made = case.inputs(device)
        triton_interpreter.REACHABLE[:] = cases.flatten(made)
        return made

    return dataclasses.replace(case, inputs=inputs)


def results(case: cases.Case) -> list[torch.Tensor]:
    return cases.call(cases.public(case), case, reachable(case).inputs(CPU))


def small(op: str, function: str) -> cases.Case:
    """The cheapest case of a function that is not trivial."""
    able = [c for o, c in CASES if o == op and c.function == function and c.bytes_moved > 64]
    return min(able, key=lambda c: c.bytes_moved)


@pytest.fixture(autouse=True)
def in_order():
    yield
    triton_interpreter.ORDER["programs"] = "forward"


@pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
def test_case_agrees_with_reference_in_float64(op, case):
    assert dispatch.backend_of(op, "cpu") == "triton"
    assert cases.error(reachable(case), CPU) <= case.tolerance


FUNCTIONS = sorted({(op, case.function) for op, case in CASES})


@pytest.mark.parametrize(("op", "function"), FUNCTIONS, ids=[f for _, f in FUNCTIONS])
def test_order_of_programs_does_not_matter(op, function):
    case = small(op, function)
    first = results(case)
    for order in ("backward", 0):
        triton_interpreter.ORDER["programs"] = order
        again = results(case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), order


def in_dtype(case: cases.Case, dtype: torch.dtype) -> cases.Case:
    """The case with its float32 inputs in another dtype."""

    def change(value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            # As a view of its storage where it is one, so that strides are kept.
            return torch.empty_strided(value.shape, value.stride(), dtype=dtype).copy_(value)
        return dtype if value == torch.float32 else value

    return dataclasses.replace(case, inputs=lambda device: cases.map_tensors(case.inputs(device), change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("op", "function"), FUNCTIONS, ids=[f for _, f in FUNCTIONS])
def test_low_precision_is_not_worse_than_torch(op, function, dtype, monkeypatch):
    """Against float64, at most 1.5 times the error of the reference in the same dtype."""
    case = small(op, function)
    if "dtype" not in inspect.signature(cases.public(case)).parameters and not case.grads and op != "token_loss":
        pytest.skip("no floats of free dtype among the arguments")
    case = in_dtype(case, dtype)
    case = dataclasses.replace(case, tolerance=0)
    got = cases.error(reachable(case), CPU)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert got <= 1.5 * cases.error(case, CPU) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_gelu_of_every_16_bit_number_is_exact_but_for_its_rounding(dtype):
    """Value and gradient against float64: half a unit in the last place, and a little of the polynomial's."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None].requires_grad_()
    out = fk.bias_gelu(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    y = x.detach().double()
    below = torch.special.ndtr(y)
    slope = below + y * torch.exp(-y * y / 2) / math.sqrt(2 * math.pi)
    rounding, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = 7e-6 * torch.special.ndtr(-y.abs())  # of Phi(y)
    for got, exact, share in ((out, y * below, allowed * y.abs()), (grad, slope, allowed)):
        error = (got.detach().double() - exact).abs()
        assert (error <= (rounding + 3e-7) * exact.abs() + share + 6e-9 + least).all()
    largest, unknown = fk.bias_gelu(torch.tensor([math.inf, math.nan], dtype=dtype)).tolist()
    assert largest == math.inf and math.isnan(unknown)


def test_addresses_beyond_two_to_the_31(tmp_path):
    """Images two billion values apart, in a file with holes: 32-bit arithmetic would leave it."""
    apart = (1 << 31) + 24
    x = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * apart + 64, dtype=torch.uint8)
    x = x.as_strided((3, 4, 5), (apart, 5, 1))
    x.copy_(torch.arange(60).view(3, 4, 5))
    ids = torch.tensor([[2, 0], [1, 3], [3, 2]])
    assert torch.equal(fk.gather_tokens(x, ids), x[torch.arange(3)[:, None], ids])

    images = x.as_strided((3, 1, 4, 4), (apart, 16, 4, 1))
    expected = images.float().reshape(3, 1, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(3, 4, 4) / 255
    assert torch.equal(fk.patchify_gather(images, None, 2), expected)
    far = x.as_strided((1, 3, 4, 4), (0, apart, 4, 1))
    expected = far.float().reshape(1, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, 12) / 255
    assert torch.equal(fk.patchify_gather(far, None, 2), expected)
    view = fk.shift_flip_jitter(images, size=(3, 3), offset=torch.ones(3, 2, dtype=torch.int64))
    assert torch.equal(view, images[:, :, 1:, 1:].float() / 255)


def test_accesses_outside_of_tensors_raise():
    @triton.jit
    def copy(source, target):
        index = tl.arange(0, 8)
        tl.store(target + index, tl.load(source + index))

    with pytest.raises(Exception, match="load outside"):
        copy[(1,)](torch.ones(4), torch.zeros(8))
    with pytest.raises(Exception, match="store outside"):
        copy[(1,)](torch.ones(8), torch.zeros(4))


def test_bfloat16_of_the_interpreter_rounds_as_a_gpu():
    @triton.jit
    def mixed(a, b, out):
        index = tl.arange(0, 64)
        x, y = tl.load(a + index), tl.load(b + index)
        tl.store(out + index, tl.where(x > y, x * y, x + y))

    a, b = (torch.randn(64, generator=cases.generator(s)).bfloat16() for s in (1, 2))
    out = torch.empty(64, dtype=torch.bfloat16)
    mixed[(1,)](a, b, out)
    assert torch.equal(out, torch.where(a > b, a * b, a + b))


def test_topk_keeps_ties_and_prefix_and_lets_nan_through():
    q = torch.ones(1, 1, 6, 16)
    k = torch.zeros(1, 1, 6, 16)
    k[0, 0, :, 0] = torch.tensor([-5.0, 3, 2, 2, 1, 0])  # a prefix key of low score, two keys that tie
    v = torch.eye(6).repeat(1, 3)[None, None, :, :16].contiguous()
    out = fk.topk_attention(q, k, v, 2, num_prefix=1, scale=1.0)
    weights = out[0, 0, 3, :6]
    assert (weights[:4] > 0).all() and (weights[4:] == 0).all()
    assert (out[0, 0, 0, :6] > 0).all()
    k[0, 0, 4, 0] = float("nan")
    assert fk.topk_attention(q, k, v, 2, num_prefix=1, scale=1.0)[0, 0, 3].isnan().all()


def test_topk_attention_over_long_rows():
    """More tokens than one tile of any kind."""
    g = cases.generator(3)
    q, k, v = (torch.randn((1, 1, 290, 16), generator=g) for _ in range(3))
    got = fk.topk_attention(q, k, v, 40, num_prefix=2)
    from fastmim_kernels.topk import reference

    assert torch.allclose(got, reference.topk_attention(q, k, v, 40, num_prefix=2), atol=1e-5)


def test_contrastive_loss_over_several_ranges_of_keys():
    """Ranges of keys are added up; one row, many keys, so that every program has its own range."""
    g = cases.generator(4)
    q, k = (torch.nn.functional.normalize(torch.randn((n, 8), generator=g), dim=1) for n in (3, 300))
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = fk.contrastive_loss(q, k, offset=70, temperature=0.2)
    truth = torch.nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(70, 73))
    assert math.isclose(loss.item(), truth.item(), rel_tol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, (q, k)) for x in (loss, truth)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_token_loss_has_the_gradients_of_the_reference(monkeypatch):
    g = cases.generator(5)
    x, weight, bias = (torch.randn(s, generator=g).requires_grad_() for s in ((7, 10), (33, 10), (33,)))
    labels = torch.randint(0, 33, (7,), generator=g)

    def run():
        loss, accuracy = fk.linear_cross_entropy(x, weight, bias, labels, chunk=3)
        return [loss.detach(), accuracy, *torch.autograd.grad(3 * loss, (x, weight, bias))]

    got = run()
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, run(), strict=True))
    with torch.no_grad():
        assert torch.allclose(fk.linear_cross_entropy(x, weight, bias, labels).loss, got[0])


def test_gather_is_twice_differentiable_and_others_say_that_they_are_not():
    x = torch.randn(2, 4, 3, dtype=torch.float32, requires_grad=True)
    ids = torch.tensor([[1, 3], [0, 2]])
    (grad,) = torch.autograd.grad((fk.gather_tokens(x, ids) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second.sum(1), torch.full((2, 3), 4.0))
    q, k = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    with pytest.raises(NotImplementedError, match="contrastive_loss: expected a first derivative"):
        torch.autograd.grad(fk.contrastive_loss(q, k, temperature=1.0), q, create_graph=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(fk.bias_gelu(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="bias_gelu: expected a first derivative"):
        grad.sum().backward()


# opcheck copies arguments to where the interpreter knows of no tensors, so not for kernels that get addresses in a table.
CHECKED = [(op, function) for op, function in FUNCTIONS if op not in ("ema", "adamw")]


@pytest.mark.parametrize(("op", "function"), CHECKED, ids=[f for _, f in CHECKED])
def test_registration_passes_opcheck(op, function):
    """Every call of a registered op in a forward and backward pass, through torch's own checks of schema and fake."""
    case = small(op, function)
    with Recorder() as recorder:
        results(case)
    assert recorder.calls
    for called, args in recorder.calls:
        # A leaf of its own each. Ops that compute a gradient have none.
        args = cases.map_tensors(args, lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t)
        if case.grads and "backward" not in str(called):
            is_float = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()  # noqa: E731
            args = [a.requires_grad_() if is_float(a) else a for a in args]
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(called, tuple(args), test_utils=utils)


def step_of_all(x, mask_token, pos, ids, images, q, k, rng, sample):
    """A forward pass that calls what a step of MAE with a contrastive loss calls."""
    drawn = fk.random_masking(rng, sample, 9, 3)
    seen = fk.gather_tokens(x, drawn.ids_keep)
    restored = fk.restore_tokens(seen, mask_token, pos, drawn.ids_restore, 0)
    pred = fk.gather_tokens(restored, drawn.ids_masked)
    loss = fk.masked_pixel_loss(pred, images, drawn.ids_masked, 2, mean=None, std=None)
    return loss + fk.contrastive_loss(q, k, temperature=0.5) + fk.uniform(rng, sample, 1, 4).sum()


def block_of_all(x, stream, weight, qkv, table, src, labels):
    """What a block of MixedAE, its losses and CAE's head call."""
    y, stream = fk.add_layer_norm(x, stream, weight, None, prenorm=True)
    q, k, v = qkv.unbind(2)
    out = fk.topk_attention(q, k, v, 2, num_prefix=0)
    y = fk.bias_gelu(y + out.transpose(1, 2).flatten(2), weight)
    loss = fk.linear_cross_entropy(y.flatten(0, 1), table, None, labels.flatten()).loss
    return loss + fk.patch_contrastive_loss(stream + y, src, 0.5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block_of_all, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        g = cases.generator(7)
        shapes = ((batch, 5, 8), (batch, 5, 8), (8,), (batch, 2, 3, 5, 4), (6, 8))
        floats = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
        rest = (torch.arange(5).expand(batch, -1) % 2, torch.randint(0, 6, (batch, 5), generator=g))
        grads = []
        for function in (block_of_all, compiled):
            loss = function(*floats, *rest)
            grads.append([loss, *torch.autograd.grad(loss, floats)])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_step_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step_of_all, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        g = cases.generator(6)
        floats = [torch.randn(s, generator=g).requires_grad_() for s in ((batch, 9, 4), (4,), (9, 4))]
        images = torch.randint(0, 256, (batch, 1, 6, 6), generator=g, dtype=torch.uint8)
        q, k = (torch.randn((batch, 5), generator=g).requires_grad_() for _ in range(2))
        rest = (torch.zeros(0), images, q, k, torch.tensor([3, 4]), torch.arange(batch))
        grads = []
        for function in (step_of_all, compiled):
            loss = function(*floats, *rest)
            grads.append([loss, *torch.autograd.grad(loss, (*floats, q, k))])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_ema_compiles_and_updates_in_place():
    torch._dynamo.reset()
    targets = [torch.zeros(3, 4), torch.zeros(5)]
    onlines = [torch.ones(3, 4), torch.ones(5)]
    triton_interpreter.REACHABLE[:] = targets + onlines
    compiled = torch.compile(lambda: fk.ema_update(targets, onlines, 0.75), fullgraph=True, backend="eager")
    compiled()
    assert all(torch.equal(t, torch.full_like(t, 0.25)) for t in targets)


def test_float64_is_left_to_the_reference():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    q = torch.randn(2, 4, dtype=torch.float64)
    assert fk.contrastive_loss(q, q, temperature=1.0).dtype == torch.float64
    out = fk.restore_tokens(x, torch.zeros(3), torch.zeros(6, 3), torch.arange(5).expand(2, 5))
    assert out.dtype == torch.float64


def gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    made = [x.clone().requires_grad_() for x in inputs]
    triton_interpreter.REACHABLE[:] = made
    out = function(*made)
    return list(torch.autograd.grad(out, made, torch.linspace(-1, 1, out.numel()).view(out.shape)))


def test_topk_does_not_mind_who_keeps_what_its_backward_pass_needs():
    """torch's own way to keep activations in another memory lays them out anew."""
    g = cases.generator(9)
    inputs = [torch.randn(1, 2, 5, 8, generator=g) for _ in range(3)]

    def kept_elsewhere(*made):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous().clone(), lambda x: x):
            return fk.topk_attention(*made, 3, num_prefix=1)

    plain = gradients(lambda *made: fk.topk_attention(*made, 3, num_prefix=1), inputs)
    for ours, theirs in zip(gradients(kept_elsewhere, inputs), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("images", [2, 32])
def test_restore_counts_each_image_once_whatever_was_tuned(images, monkeypatch):
    """Chunks are of 16 images: a larger step must end with its own."""
    monkeypatch.setitem(tuning.table("")["restore"], "IMAGES", images)
    ids = torch.stack([torch.randperm(6, generator=cases.generator(i)) for i in range(20)])
    inputs = [torch.randn(s, generator=cases.generator(3)) for s in ((20, 4, 8), (8,), (7, 8))]
    found = gradients(lambda *made: fk.restore_tokens(*made, ids), inputs)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    expected = gradients(lambda *made: fk.restore_tokens(*made, ids), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_bias_with_strides_is_read_as_it_lies():
    g = cases.generator(4)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((9, 4), (10, 4), (20,)))
    labels = torch.arange(9)
    found = fk.linear_cross_entropy(x, weight, bias[::2], labels).loss
    assert torch.allclose(found, torch.nn.functional.cross_entropy(x @ weight.T + bias[::2], labels), atol=1e-6)


def test_a_wide_blur_is_the_one_of_the_reference(monkeypatch):
    """Above a radius of 16 its taps are a loop."""
    images = torch.randint(0, 256, (2, 3, 12, 14), generator=cases.generator(5), dtype=torch.uint8)
    sigma = torch.tensor([7.0, 0.0])
    triton_interpreter.REACHABLE[:] = [images, sigma]
    found = fk.shift_flip_jitter(images, size=(9, 11), blur_sigma=sigma, max_blur_sigma=7.0)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    expected = fk.shift_flip_jitter(images, size=(9, 11), blur_sigma=sigma, max_blur_sigma=7.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
