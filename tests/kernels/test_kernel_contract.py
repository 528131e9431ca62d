"""What holds for every function of fastmim_kernels alike, whatever computes it."""

import re

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
        yield from (value.to("meta"), value.tolist(), "tensor", None)
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
    elif isinstance(value, bool):
        pass
    elif isinstance(value, (int, float)):
        yield from (-1, 0, 300, -value, float("nan"), float("inf"), "3", None)
    elif isinstance(value, str):
        yield from ("no such kind", 3)
    elif isinstance(value, torch.dtype):
        yield from (torch.int32, torch.float64, torch.float16, torch.complex64, "float32")


# F.linear's own errors are passed on.
CHECKED = sorted(set(FUNCTIONS) - {"linear"})


@pytest.mark.parametrize("function", CHECKED)
def test_wrong_calls_are_right_or_one_clear_line(function):
    case = FUNCTIONS[function]
    public, reference = cases.public(case), getattr(dispatch.reference(OF[function]), function)
    tried = refused = 0
    for name, value in case.inputs(CPU).items():
        for i, wrong in enumerate(wrong_values(value)):
            inputs = case.inputs(CPU) | {name: wrong}
            what = (
                f"{function}({name}: {wrong.dtype} {tuple(wrong.shape)} {wrong.device})"
                if isinstance(wrong, torch.Tensor)
                else f"{function}({name}={wrong!r}) #{i}"
            )
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
                        half = a.dtype in (torch.float16, torch.bfloat16) or torch.float16 in dtypes_of(wrong)
                        torch.testing.assert_close(a, b, msg=what, **(HALF if half else CLOSE))
    assert refused > tried / 3


# Layouts, precision, compilation, gradients.


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
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


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
