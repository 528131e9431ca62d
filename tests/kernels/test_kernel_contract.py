"""What holds for every function of fastmim_kernels alike, whatever computes it."""

import re

import fastmim_kernels as fk
import fastmim_kernels.functional
import pytest
import torch
from fastmim_kernels import cases, dispatch

CPU = torch.device("cpu")
FUNCTIONS: dict[str, cases.Case] = {}
for op in dispatch.ops():
    # The cheapest case of each function that is not trivial, gradients preferred.
    able = [c for c in cases.load(op)[0] if c.bytes_moved > 64]
    for case in sorted(able, key=lambda c: (not c.grads, c.bytes_moved)):
        FUNCTIONS.setdefault(case.function, case)
OF = {case.function: op for op in dispatch.ops() for case in cases.load(op)[0]}
EVERY = pytest.mark.parametrize("function", sorted(FUNCTIONS))
DIFFERENTIABLE = sorted(f for f, case in FUNCTIONS.items() if case.grads)
# Values that differ between implementations by rounding of sums.
HALF = {"rtol": 1e-2, "atol": 1e-2, "equal_nan": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}


def dtypes_of(value) -> list[torch.dtype]:
    return [t.dtype for t in cases.flatten(value) if isinstance(t, torch.Tensor)]


def results(case: cases.Case, function=None, inputs=None) -> list[torch.Tensor]:
    return cases.call(function or cases.public(case), case, case.inputs(CPU) if inputs is None else inputs)


# Wrong calls: right, or one clear line.

MESSAGE = re.compile(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+\.")


def wrong_values(value):
    """Other values for an argument: some wrong, some merely unusual."""
    if isinstance(value, torch.Tensor):
        dtypes = (torch.int32, torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64)
        yield from (value.to(dtype) for dtype in dtypes)
        yield value[None]
        if value.ndim:
            yield from (value[0:0], torch.cat([value, value]), value.flatten(), value[..., :-1])
            yield torch.cat([value, value], -1)
        yield from (value.to("meta"), value.to_sparse(), value.tolist(), "tensor", None)
        if value.is_floating_point():
            yield value.to(torch.float8_e4m3fn)
        if value.ndim:
            yield torch.nested.nested_tensor([value, value])
        if not value.is_floating_point() and value.dtype == torch.int64:
            yield from (value - 1000, value + 1000)
    elif isinstance(value, (list, tuple)) and value:
        yield from (
            value[:-1],
            (*value, value[0]),
            [],
            None,
            3,
            type(value)(value[:1]) * len(value) if type(value) in (list, tuple) else None,
        )
        if all(isinstance(item, int) for item in value):
            yield tuple(-item for item in value)
            yield tuple(1 << 31 for item in value)
            yield tuple(1 << 70 for item in value)
    elif isinstance(value, bool):
        pass
    elif isinstance(value, (int, float)):
        yield from (-1, 0, 300, -value, float("nan"), float("inf"), 1 << 70, "3", None)
    elif isinstance(value, str):
        yield from ("no such kind", 3)
    elif isinstance(value, torch.dtype):
        yield from (torch.int32, torch.float64, torch.float16, torch.complex64, "float32")


def said(value) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    # A nested tensor has no shape.
    shape = "nested" if value.is_nested else tuple(value.shape)
    return f"{value.dtype} {shape} {value.device} {value.layout}"


@EVERY
def test_wrong_calls_are_right_or_one_clear_line(function):
    case = FUNCTIONS[function]
    public, reference = cases.public(case), getattr(dispatch.reference(OF[function]), function)
    tried = refused = 0
    for name, value in case.inputs(CPU).items():
        for i, wrong in enumerate(wrong_values(value)):
            inputs = case.inputs(CPU) | {name: wrong}
            what = f"{function}({name}={said(wrong)}) #{i}"
            tried += 1
            try:
                got = cases.flatten(public(**inputs))
            except (ValueError, TypeError, IndexError) as e:
                refused += 1
                assert MESSAGE.fullmatch(str(e)), f"{what}: {type(e).__name__}: {e}"
            except Exception as e:
                raise AssertionError(f"{what}: {type(e).__name__}: {str(e)[:300]}") from e
            else:
                if not case.result and got and got[0].device.type == "cpu":
                    for a, b in zip(got, cases.flatten(reference(**(case.inputs(CPU) | {name: wrong}))), strict=True):
                        if a.dtype.itemsize == 1:
                            a, b = a.view(torch.uint8), b.view(torch.uint8)
                        half = a.dtype in (torch.float16, torch.bfloat16) or torch.float16 in dtypes_of(wrong)
                        torch.testing.assert_close(a, b, msg=what, **(HALF if half else CLOSE))
    assert refused > tried / 3


# Each of these crashed, or gave numbers that were none.
G = torch.Generator().manual_seed(0)
RNG, IDS = torch.tensor([1, 2]), torch.arange(3)
NORMAL = lambda *shape: torch.randn(shape, generator=G)  # noqa: E731
HOSTILE = {
    # A product of two negative numbers is a number of patches.
    "cell_masking_negative_grid": lambda: fk.cell_masking(RNG, IDS, (-6, -4), 1, 3),
    "block_masking_negative_grid": lambda: fk.block_masking(RNG, IDS, (-6, -4), 3),
    "depthwise_negative_grid": lambda: fk.depthwise_patches(NORMAL(1, 6, 2, 2, 4), None, NORMAL(4, 1, 3, 3), NORMAL(4), (-2, -3)),
    "depthwise_huge_grid": lambda: fk.depthwise_patches(NORMAL(1, 1, 2, 2, 4), torch.zeros((1, 1), dtype=torch.int64), NORMAL(4, 1, 3, 3), NORMAL(4), (1 << 31, 1 << 31)),
    "depthwise_one_place_twice": lambda: fk.depthwise_patches(NORMAL(1, 2, 2, 2, 4), torch.tensor([[3, 3]]), NORMAL(4, 1, 3, 3), NORMAL(4), (2, 3)),
    "restore_no_permutation": lambda: fk.restore_tokens(NORMAL(1, 3, 4), NORMAL(4), NORMAL(5, 4), torch.tensor([[0, 1, 1, 3]])),
    "views_huge_blur": lambda: fk.shift_flip_jitter(torch.zeros(2, 3, 4, 4), size=(4, 4), blur_sigma=torch.ones(2), max_blur_sigma=1e10),
    "views_no_size": lambda: fk.shift_flip_jitter(torch.zeros(2, 3, 4, 4), size=(4,)),
    "pixel_loss_no_channel": lambda: fk.masked_pixel_loss(torch.zeros(1, 1, 0), torch.zeros(1, 0, 4, 4), torch.zeros((1, 1), dtype=torch.int64), 2, mean=None, std=None, norm=False),
    "topk_no_width": lambda: fk.topk_attention(*NORMAL(3, 1, 2, 5, 0), 2),
    "resize_huge_size": lambda: fk.random_resized_crop(torch.zeros(1, 3, 4, 4), torch.tensor([[0, 0, 4, 4]]), (1 << 31, 4), dtype=torch.float32),
    "block_masking_huge_aspect": lambda: fk.block_masking(RNG, IDS, (14, 14), 98, aspect=(0.3, 1e300)),
    "restore_complex_position": lambda: fk.restore_tokens(NORMAL(1, 3, 4), NORMAL(4), NORMAL(5, 4).to(torch.complex64), torch.arange(4)[None]),
    "patch_embedding_of_other_channels": lambda: fk.functional.project_patches(NORMAL(1, 3, 8, 8), NORMAL(5, 4, 4, 4), None),
    "linear_gelu_of_a_list": lambda: fk.functional.linear_gelu([1.0], NORMAL(5, 4), None),
    "linear_mixed_dtypes": lambda: fk.linear(NORMAL(3, 4).bfloat16(), NORMAL(5, 4).requires_grad_()),
    "linear_mixed_devices": lambda: fk.linear(NORMAL(3, 4), NORMAL(5, 4).to("meta")),
    "ema_expanded_targets": lambda: fk.ema_update([torch.ones(1).expand(3)], [torch.ones(3)], 0.5),
    "ema_momentum_of_bool": lambda: fk.ema_update([torch.ones(3)], [torch.ones(3)], torch.tensor(True)),
    "adamw_expanded_moments": lambda: fk.adamw_ema([torch.ones(3)], [torch.ones(3)], [torch.ones(1).expand(3)], [torch.ones(3)], step=1, lr=0.1),
    "layer_norm_no_width": lambda: fk.add_layer_norm(NORMAL(4, 0), None, torch.nn.Parameter(NORMAL(0))),
    "layer_norm_prenorm_of_tensors": lambda: fk.add_layer_norm(NORMAL(4, 3), None, NORMAL(3), prenorm=NORMAL(2)),
    "patches_dtype_of_tensors": lambda: fk.patchify_gather(NORMAL(1, 3, 4, 4), None, 2, dtype=torch.zeros(2)),
    "resize_kind_of_numbers": lambda: fk.random_resized_crop(NORMAL(1, 3, 4, 4), torch.tensor([[0, 0, 4, 4]]), (2, 2), interpolation=NORMAL(99)),
    "views_size_of_lines": lambda: fk.shift_flip_jitter(torch.zeros(2, 3, 4, 4), size=NORMAL(40, 40)),
    "patches_mean_of_lines": lambda: fk.patchify_gather(NORMAL(1, 3, 4, 4), None, 2, mean=NORMAL(40, 40), std=["0\n"] * 999),
    "views_inside_of_vmap": lambda: torch.vmap(lambda x: fk.shift_flip_jitter(x, size=(4, 4)))(torch.zeros(2, 1, 3, 4, 4)),
    "ema_negated_targets": lambda: fk.ema_update([torch.zeros(3, dtype=torch.complex64).conj().imag], [torch.ones(3)], 0.5),
    "adamw_decays_of_lists": lambda: fk.adamw_ema([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], step=1, lr=0.1, weight_decay=[[0.1]]),
    "adamw_step_elsewhere": lambda: fk.adamw_ema([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.ones(3)], step=torch.tensor(1, device="meta"), lr=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_calls_get_one_line(name):
    with pytest.raises((ValueError, TypeError)) as caught:
        HOSTILE[name]()
    assert MESSAGE.fullmatch(str(caught.value)), caught.value


@EVERY
def test_meta_tensors_give_shapes(function):
    case = FUNCTIONS[function]
    expected, got = results(case), results(case, inputs=case.inputs(torch.device("meta")))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    assert all(t.device.type == "meta" for t in got)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_nan_of_bfloat16_attention_comes_through(part):
    """One NaN in a key reaches every row, in a query its own."""
    qkv = NORMAL(1, 40, 3, 2, 16).bfloat16()
    qkv[0, 7, ["query", "key", "value"].index(part), 1, 3] = torch.nan
    out = fk.qkv_attention(qkv)
    expected = dispatch.reference("qkv").qkv_attention(qkv)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()


def test_layer_norm_takes_no_eps_as_torch_does():
    x, weight = NORMAL(2, 5), NORMAL(5)
    ours, theirs = (f(x, (5,), weight, eps=0.0) for f in (fk.functional.layer_norm, torch.nn.functional.layer_norm))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError):
        fk.functional.layer_norm(x.tolist(), 5, weight)


def test_attention_without_heads_is_empty():
    q = torch.zeros((2, 0, 5, 4), requires_grad=True)
    out = fk.topk_attention(q, q, q, 2)
    out.sum().backward()
    assert out.shape == q.grad.shape == (2, 0, 5, 4)


@pytest.mark.parametrize("bias", [torch.ones(1).expand(5), torch.arange(10.0)[::2]], ids=["expanded", "strided"])
def test_bias_of_a_linear_layer_may_have_any_strides(bias):
    x, weight = NORMAL(3, 4).bfloat16(), NORMAL(5, 4).bfloat16().requires_grad_()
    assert torch.equal(fk.linear(x, weight, bias.bfloat16()), fk.linear(x, weight, bias.bfloat16().contiguous()))


def test_second_derivative_of_a_linear_layer_is_right_or_refused():
    """Its gradient of x hangs on the weight."""
    x, weight = (NORMAL(*shape).bfloat16().requires_grad_() for shape in ((3, 4), (5, 4)))
    try:
        (grad,) = torch.autograd.grad(fk.linear(x, weight).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), weight)
    except NotImplementedError as e:
        assert MESSAGE.fullmatch(str(e))
    else:
        assert torch.equal(second, torch.full((5, 4), 3.0).bfloat16())


# Layouts, precision, transforms, compilation, gradients.


def spread(value):
    """The same numbers, none of them beside another in memory."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    return torch.stack([value, torch.zeros_like(value)], -1)[..., 0]


@EVERY
def test_any_strides_give_the_same(function):
    case = FUNCTIONS[function]
    expected = results(case)
    got = results(case, inputs=cases.map_tensors(case.inputs(CPU), spread))
    op = cases.public(case).__module__.rpartition(".")[2]
    # torch rounds bfloat16 differently where values do not lie side by side: its GELU by vectors and one by one.
    is_torchs = dispatch.backend_of(op, "cpu") == "reference"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(HALF if is_torchs and a.dtype == torch.bfloat16 else CLOSE))


def in_dtype(inputs: cases.Inputs, dtype: torch.dtype) -> cases.Inputs:
    """float32 tensors and result dtypes in another dtype; what an op keeps in float32 (results in place) stays."""
    return cases.map_tensors(
        inputs, lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.dtype == torch.float32 else dtype if v == torch.float32 else v
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@EVERY
def test_low_precision_is_not_worse_than_torch(function, dtype, monkeypatch):
    """Against float64, at most 1.5 times the error of the reference in the same dtype, plus one last bit."""
    case = FUNCTIONS[function]
    if case.result or not dtypes_of(in_dtype(case.inputs(CPU), dtype)):
        pytest.skip("works in place on float32")
    backend = dispatch.available(OF[function], "cpu")[-1]
    if backend == "reference":
        pytest.skip("the reference is what runs")
    ours = results(case, inputs=in_dtype(case.inputs(CPU), dtype))
    truth = results(case, inputs=cases.upcast(in_dtype(case.inputs(CPU), dtype)))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    theirs = results(case, inputs=in_dtype(case.inputs(CPU), dtype))
    for got, torchs, exact in zip(ours, theirs, truth, strict=True):
        assert got.dtype == torchs.dtype and got.shape == torchs.shape
        if got.numel() and got.is_floating_point():
            scale = exact.double().abs().max().clamp_min(1e-30)
            error, allowed = (float((t.double() - exact.double()).abs().max() / scale) for t in (got, torchs))
            assert error <= 1.5 * allowed + torch.finfo(got.dtype).eps


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradient_by_transform_is_that_of_autograd(function):
    case = FUNCTIONS[function]
    inputs = case.inputs(CPU)
    sources = [inputs.pop(name) for name in case.grads]

    def total(*values):
        got = cases.flatten(cases.public(case)(**inputs, **dict(zip(case.grads, values, strict=True))))
        return (got[0] * (torch.arange(got[0].numel()) % 7 - 3).view(got[0].shape)).sum()

    got = torch.func.grad(total, argnums=tuple(range(len(sources))))(*sources)
    expected = torch.autograd.grad(total(*(s.requires_grad_() for s in sources)), sources)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(HALF if a.dtype == torch.bfloat16 else CLOSE))


@pytest.mark.parametrize(
    "function", sorted(f for f, case in FUNCTIONS.items() if not case.result and f != "shift_flip_jitter")
)
def test_vmap_gives_what_a_loop_gives(function):
    case = FUNCTIONS[function]
    inputs = case.inputs(CPU)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def call(*values):
        return tuple(cases.flatten(cases.public(case)(**inputs | dict(zip(tensors, values, strict=True)))))

    together = torch.vmap(call)(*(torch.stack([t, t]) for t in tensors.values()))
    for got, expected in zip(together, call(*tensors.values()), strict=True):
        tolerance = HALF if expected.dtype == torch.bfloat16 else CLOSE
        torch.testing.assert_close(got, torch.stack([expected, expected]), **tolerance)


@EVERY
def test_autocast_changes_no_dtype(function):
    case = FUNCTIONS[function]
    expected = results(case)

    def under_autocast(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return cases.public(case)(**inputs)

    got = results(case, under_autocast)
    if function == "linear":
        # As F.linear does.
        return
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **(HALF | {"atol": 3e-2} if function == "linear_cross_entropy" else CLOSE))


# Its reference picks images by what they ask for; compiled graphs leave it outside.
UNTRACED = set() if dispatch.backend_of("views", "cpu") == "native" else {"shift_flip_jitter"}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - UNTRACED))
def test_compiles_to_one_graph(function, dynamic):
    """Forward and backward. What native.py has is compiled statically in test_kernel_native.py."""
    if dynamic is None and "native" in dispatch.available(OF[function], "cpu"):
        pytest.skip("see test_kernel_native.py")
    case = FUNCTIONS[function]
    torch._dynamo.reset()
    compiled = torch.compile(
        cases.public(case), fullgraph=True, dynamic=dynamic, backend="aot_eager" if case.grads else "eager"
    )
    for a, b in zip(results(case, compiled), results(case), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradients_of_references_are_numerically_right(function, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    case = FUNCTIONS[function]
    inputs = cases.upcast(case.inputs(CPU))
    sources = [inputs.pop(name).requires_grad_() for name in case.grads]

    def differentiable(*values):
        outputs = cases.flatten(cases.public(case)(**inputs, **dict(zip(case.grads, values, strict=True))))
        return tuple(o for o in outputs if o.requires_grad)

    # fast_mode: one random direction instead of every input.
    assert torch.autograd.gradcheck(differentiable, sources, fast_mode=True, atol=1e-4)
