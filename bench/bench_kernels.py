"""Times every op of fastmim_kernels: `fastmim bench kernels`, or a part of them with `-k masked_pixel_loss`.

Each case runs on every backend that the op has there, against the plain torch of plain_torch.py, eager and through
torch.compile where an equal exists. All of them take turns, so that a slow phase of the machine hits all alike; a row
holds medians of forward and backward (forward alone where the op has no gradient): process CPU time on a CPU, wall time
on a GPU. Nothing is timed before its results agree with the reference in float64. Nothing is asserted about time.

FASTMIM_BENCH_SHORT=1 (what `pytest bench` sets): one size per op, of a step with 8 images, 5 rounds, no torch.compile, which
takes most of the time. FASTMIM_BENCH_CALLS: rounds per case (20). FASTMIM_BENCH_COMPILE_OPS=0 or 1. FASTMIM_BENCH_OUT=FILE.jsonl
(`fastmim bench kernels --json FILE`): adds each row to that file as soon as it is measured, leaves out what the file has, and
writes tables and pictures beside it. First and last come the machine's ceilings.
"""

import importlib
import inspect
import os
import pathlib
import platform
import statistics
import time

import plain_torch
import pytest
import report
import sizes
import torch
from fastmim_kernels import cases, dispatch
from fastmim_kernels.patches import spec as patches
from fastmim_kernels.pixel_loss import spec as pixel_loss
from fastmim_kernels.topk import spec as topk
from kernel_report import BACKENDS
from machine import between_ceilings, machine
from points import Points

from fastmim.device import cpu_capability

DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
# Whole images instead of windows, as plain torch has them; the batch of the other ops.
WHOLE = {
    "patches": (patches.case((64, 3, 224, 224), 16, keep=49), patches.case((64, 3, 224, 224), 16, keep=49, dtype=torch.bfloat16)),
    "pixel_loss": (
        pixel_loss.case((64, 3, 224, 224), 16, 147),
        pixel_loss.case((64, 3, 224, 224), 16, 147, dtype=torch.bfloat16),
    ),
    "topk": (
        topk.case(64, 12, 196, 49, 64, is_coarse=True),
        topk.case(64, 12, 196, 49, 64, dtype=torch.bfloat16, is_coarse=True),
    ),
}  # fmt: skip
IS_SHORT = os.environ.get("FASTMIM_BENCH_SHORT") == "1"


def cases_of(op):
    return sizes.short_sizes().get(op, ()) if IS_SHORT else (*WHOLE.get(op, ()), *cases.load(op)[1])


RUNS = [
    pytest.param(op, case, device, id=f"{op}-{case.function}-{case.name}-{device.type}")
    for op in dispatch.ops()
    for case in cases_of(op)
    for device in DEVICES
]
CALLS, SECONDS = int(os.environ.get("FASTMIM_BENCH_CALLS", "5" if IS_SHORT else "20")), 10.0
USES_COMPILE = os.environ.get("FASTMIM_BENCH_COMPILE_OPS", "0" if IS_SHORT else "1") == "1"
# What a result may differ by from the truth, in units of max(1, |truth|): twice what the reference in the same dtype does,
# and this. Set before anything was measured.
LEAST_ERROR = 1e-5
# Plain torch that rounds to bf16 after each of its operations, where ours rounds once: what that does to sums that cancel
# (gradients of a bias) or to keys with almost equal scores (topk) has no bound; up to 19, in those units. In its place the
# same function must agree in float64. Of qkv_attention it is the reference, which is the truth in float64.
ROUNDS_OFTEN = ("add_layer_norm", "bias_gelu", "contrastive_loss", "qkv_attention", "topk_attention")
# Other random numbers; pixels beside the box are left out.
INCOMPARABLE = ("random_masking", "random_resized_crop")
KEY = ("suite", "function", "case", "setting")


class Provider:
    """One way to compute a case, able to take a step."""

    def __init__(self, function, case, device, backend=""):
        self.function, self.backend, self.device = function, backend, device
        self.inputs = case.inputs(device)
        self.sources = [self.inputs[name].requires_grad_() for name in case.grads]
        self.ones = None
        self.seconds, self.forward_seconds = [], []

    def step(self):
        if self.backend:
            os.environ[dispatch.VARIABLE] = self.backend
        outputs = [o for o in cases.flatten(self.function(**self.inputs)) if isinstance(o, torch.Tensor)]
        if self.sources:
            self.ones = self.ones or [torch.ones_like(o) for o in outputs]
            torch.autograd.grad(outputs, self.sources, self.ones)

    def forward(self):
        if self.backend:
            os.environ[dispatch.VARIABLE] = self.backend
        with torch.no_grad():
            self.function(**self.inputs)

    def timed(self):
        self.seconds.append(self.clocked(self.step))
        self.forward_seconds.append(self.clocked(self.forward) if self.sources else self.seconds[-1])

    def clocked(self, action):
        is_gpu = self.device.type == "cuda"
        clock = time.perf_counter if is_gpu else time.process_time
        if is_gpu:
            torch.cuda.synchronize()
        begin = clock()
        action()
        if is_gpu:
            torch.cuda.synchronize()
        return clock() - begin


def median_ms(seconds):
    return round(1e3 * statistics.median(seconds), 4)


def plain(case, device, allowed):
    """The function of plain_torch that computes ``case``, or None where it has none for these arguments.

    Args:
        allowed: error, see LEAST_ERROR.

    Raises:
        AssertionError: it computes something else.
    """
    function = getattr(plain_torch, case.function, None)
    inputs = case.inputs(device)
    if (
        function is None
        or set(inputs) - set(inspect.signature(function).parameters)
        or inputs.get("labels") is not None
    ):
        return None
    if case.function not in INCOMPARABLE:
        error = plain_error(function, case, device)
        assert error <= allowed, (
            f"plain {case.function} {case.name}: expected an error of {allowed:.1e}, got {error:.1e}"
        )
    return function


def plain_error(function, case, device):
    """Of a function of plain_torch against the reference in float64; in float64 as well, if it rounds often."""
    exact = cases.upcast(case.inputs(device))
    is_low = any(t.dtype == torch.bfloat16 for t in cases.flatten(case.inputs(device)) if isinstance(t, torch.Tensor))
    rounds_often = is_low and case.function in ROUNDS_OFTEN
    op = cases.public(case).__module__.rpartition(".")[2]
    reference = getattr(importlib.import_module(f"{dispatch.PACKAGE}.{op}.reference"), case.function)
    # A truth of the case's own keeps what the op rounds.
    truth = reference if rounds_often else case.truth or reference
    got = cases.call(function, case, cases.upcast(exact) if rounds_often else case.inputs(device))
    differences = (
        (g.double() - t.double()).abs() / t.double().abs().clamp_min(1)
        for g, t in zip(got, cases.call(truth, case, exact), strict=True)
    )
    return max(float(d.nan_to_num(nan=float("inf")).max()) for d in differences if d.numel())


@pytest.fixture(scope="module")
def points(request):
    path = os.environ.get("FASTMIM_BENCH_OUT")
    path = pathlib.Path(path) if path else request.getfixturevalue("results") / "kernels.jsonl"
    found = Points(path)
    with between_ceilings(found):
        yield found
    report.write_report(path)
    print("\n" + path.with_suffix(".md").read_text())


def setting(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = f"{torch.get_num_threads()} thread(s)"
    return f"{platform.machine()} {cpu_capability()}, {threads}, torch {torch.__version__}, process CPU time"


@pytest.mark.parametrize(("op", "case", "device"), RUNS)
def bench_op(op, case, device, points, monkeypatch, told):
    key = ("kernels", case.function, case.name, setting(device))
    if points.has(lambda r: tuple(r.get(k) for k in KEY), key):
        pytest.skip(f"{points.path} has it already")
    monkeypatch.setenv(dispatch.VARIABLE, "")
    providers, errors = {}, {}
    for backend in dispatch.available(op, device.type):
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        errors[backend] = cases.error(case, device)
        providers[backend] = Provider(cases.public(case), case, device, backend)
    allowed = 2 * errors["reference"] + LEAST_ERROR
    judged = {b: e for b, e in errors.items() if b != "reference" or case.function not in ROUNDS_OFTEN}
    assert max(judged.values(), default=0) <= min(case.tolerance, allowed), errors
    function = plain(case, device, allowed)
    if function is not None:
        providers["eager"] = Provider(function, case, device)
        if USES_COMPILE and not case.result:
            torch._dynamo.reset()
            providers["compile"] = Provider(torch.compile(function), case, device)
    for _ in range(2):
        for provider in providers.values():
            provider.step()
    start = time.perf_counter()
    while len(provider.seconds) < CALLS and (len(provider.seconds) < 3 or time.perf_counter() - start < SECONDS):
        for provider in providers.values():
            provider.timed()
    ms = {name: median_ms(p.seconds) for name, p in providers.items()}
    points.add([{
        **dict(zip(KEY, key)), **machine(), "device_type": device.type, "n": len(provider.seconds), "ms": ms,
        "forward_ms": {name: median_ms(p.forward_seconds) for name, p in providers.items()},
        "bytes_moved": case.bytes_moved, "flops": case.flops,
    }])  # fmt: skip
    ours = next(name for name in BACKENDS if name in providers)
    told(providers[ours].seconds, {name: each / 1e3 for name, each in ms.items()})
