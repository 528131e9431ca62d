"""Times every op of fastmim_kernels on its BENCH cases: `pytest bench/bench_kernels.py -s`.

A case is timed only after its results agree with the reference in float64. Each row: median over n calls of the forward
pass and, where the op has gradients, of forward + backward; GB/s = least traffic of the forward pass / its median.
Nothing is asserted about time.
"""

import os
import platform
import statistics
import time

import pytest
import torch
from fastmim_kernels import cases, dispatch

DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
RUNS = [
    pytest.param(op, case, device, backend, id=f"{op}-{case.function}-{case.name}-{device.type}-{backend}")
    for op in dispatch.ops()
    for case in cases.load(op)[1]
    for device in DEVICES
    for backend in dispatch.available(op, device.type)
]
# Calls per case: at most CALLS, and no more after SECONDS.
CALLS, SECONDS = int(os.environ.get("FASTMIM_BENCH_CALLS", "20")), 2.0


def times_ms(step, device: torch.device) -> list[float]:
    """Wall times of single calls in ms, after two calls to warm up; on a GPU each call is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        step()
    wait()
    taken, start = [], time.perf_counter()
    while len(taken) < CALLS and (len(taken) < 3 or time.perf_counter() - start < SECONDS):
        begin = time.perf_counter()
        step()
        wait()
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken


@pytest.fixture(scope="module")
def table():
    rows: list[str] = []
    yield rows
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"\n{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads, medians of n calls")
    print(f"{'op':11} {'on':5} {'backend':10} {'case':82} {'n':>3} {'ms':>9} {'f+b ms':>9} {'GB/s':>7} {'GFLOP/s':>8}")
    print("\n".join(rows))


@pytest.mark.parametrize(("op", "case", "device", "backend"), RUNS)
def bench_op(op, case, device, backend, table, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    assert cases.error(case, device) <= case.tolerance
    function, inputs = cases.public(case), case.inputs(device)
    forward = times_ms(lambda: function(**inputs), device)
    ms = statistics.median(forward)
    both = "-"
    if case.grads:
        sources = [inputs[name].requires_grad_() for name in case.grads]
        ones = torch.ones_like(function(**inputs))
        step = lambda: torch.autograd.grad(function(**inputs), sources, ones)  # noqa: E731
        both = f"{statistics.median(times_ms(step, device)):.3f}"
    rates = f"{case.bytes_moved / ms / 1e6:7.2f} {case.flops / ms / 1e6:8.2f}"
    name = f"{case.function} {case.name}"
    table.append(f"{op:11} {device.type:5} {backend:10} {name:82} {len(forward):3} {ms:9.3f} {both:>9} {rates}")
