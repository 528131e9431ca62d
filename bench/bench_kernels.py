"""Times every op of fastmim_kernels: `pytest bench/bench_kernels.py -s`, or a part of it with `-k masked_pixel_loss`.

Each case runs on every backend that the op has there, against the plain torch of plain_torch.py, eager and through
torch.compile where an equal exists. All of them take turns, so that a slow phase of the machine hits all alike; a row
holds medians of forward and backward (forward alone where the op has no gradient): process CPU time on a CPU, wall time
on a GPU. Nothing is timed before its results agree with the reference in float64. Nothing is asserted about time.

FASTMIM_BENCH_CALLS: rounds per case (20). FASTMIM_BENCH_COMPILE=0: without torch.compile, which takes most of the time.
FASTMIM_BENCH_OUT=bench/results/kernels-cpu.jsonl: adds the rows to that file, where rows of the same case are replaced,
and writes the table of all its rows beside it, as .md.
"""

import inspect
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time

import plain_torch
import pytest
import torch
from fastmim_kernels import cases, dispatch
from fastmim_kernels.patches import spec as patches
from fastmim_kernels.pixel_loss import spec as pixel_loss
from fastmim_kernels.topk import spec as topk

DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
# Whole images instead of windows, as plain torch has them; the batch of the other ops.
WHOLE = {
    "patches": (patches.case((64, 3, 224, 224), 16, keep=49), patches.case((64, 3, 224, 224), 16, keep=49, dtype=torch.bfloat16)),
    "pixel_loss": (
        pixel_loss.case((64, 3, 224, 224), 16, 147),
        pixel_loss.case((64, 3, 224, 224), 16, 147, dtype=torch.bfloat16),
    ),
    "topk": (topk.case(64, 12, 196, 49, 64), topk.case(64, 12, 196, 49, 64, dtype=torch.bfloat16)),
}  # fmt: skip
RUNS = [
    pytest.param(op, case, device, id=f"{op}-{case.function}-{case.name}-{device.type}")
    for op in dispatch.ops()
    for case in (*WHOLE.get(op, ()), *cases.load(op)[1])
    for device in DEVICES
]
CALLS, SECONDS = int(os.environ.get("FASTMIM_BENCH_CALLS", "20")), 10.0
USES_COMPILE = os.environ.get("FASTMIM_BENCH_COMPILE", "1") == "1"
# plain_torch rounds more often than an op; what differs by more computes something else.
PLAIN_TOLERANCE = 0.2
COLUMNS = ("eager", "compile", "reference", "native", "triton")


class Provider:
    """One way to compute a case, able to take a step."""

    def __init__(self, function, case, device, backend=""):
        self.function, self.backend, self.device = function, backend, device
        self.inputs = case.inputs(device)
        self.sources = [self.inputs[name].requires_grad_() for name in case.grads]
        self.ones = None
        self.seconds = []

    def step(self):
        if self.backend:
            os.environ[dispatch.VARIABLE] = self.backend
        outputs = [o for o in cases.flatten(self.function(**self.inputs)) if isinstance(o, torch.Tensor)]
        if self.sources:
            self.ones = self.ones or [torch.ones_like(o) for o in outputs]
            torch.autograd.grad(outputs, self.sources, self.ones)

    def timed(self):
        is_gpu = self.device.type == "cuda"
        clock = time.perf_counter if is_gpu else time.process_time
        if is_gpu:
            torch.cuda.synchronize()
        begin = clock()
        self.step()
        if is_gpu:
            torch.cuda.synchronize()
        self.seconds.append(clock() - begin)

    @property
    def ms(self):
        return 1e3 * statistics.median(self.seconds)


def plain(case, device):
    """The function of plain_torch that computes ``case``, or None where it has none for these arguments."""
    function = getattr(plain_torch, case.function, None)
    inputs = case.inputs(device)
    if (
        function is None
        or set(inputs) - set(inspect.signature(function).parameters)
        or inputs.get("labels") is not None
    ):
        return None
    # Other random numbers; pixels beside the box are left out.
    if case.function not in ("random_masking", "random_resized_crop"):
        got = cases.call(function, case, case.inputs(device))
        expected = cases.call(cases.public(case), case, case.inputs(device))
        for g, e in zip(got, expected, strict=True):
            assert float((g.double() - e.double()).abs().max()) <= PLAIN_TOLERANCE * max(1.0, float(e.abs().max()))
    return function


@pytest.fixture(scope="module")
def rows():
    found = []
    yield found
    print("\n" + table(found))
    path = os.environ.get("FASTMIM_BENCH_OUT")
    if path:
        path = pathlib.Path(path)
        before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        new = {(row["function"], row["case"], row["device"]) for row in found}
        kept = [row for row in before if (row["function"], row["case"], row["device"]) not in new] + found
        kept.sort(key=lambda row: (row["device"], row["function"]))
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        path.with_suffix(".md").write_text(table(kept))


HEAD = """# Kernels

Written by `FASTMIM_BENCH_OUT=bench/results/kernels-cpu.jsonl pytest bench/bench_kernels.py`. Medians of n interleaved
rounds in ms, forward + backward (forward alone where an op has no gradient). eager, compile: the plain torch of
`bench/plain_torch.py`, as it is and through torch.compile. reference, native, triton: the backends of `fastmim_kernels`.
The ratios are those of plain torch to the backend that runs by default.
"""


def table(rows):
    """Markdown: one line per case, one table per machine."""
    lines = [HEAD]
    for where in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == where]
        shown = [c for c in COLUMNS if any(c in row["ms"] for row in own)]
        lines += [f"{where}\n", f"| op | case | n | {' | '.join(shown)} | vs eager | vs compile |"]
        lines.append("|---|---|---|" + "---|" * (len(shown) + 2))
        for row in own:
            ms = row["ms"]
            ours = next(ms[c] for c in ("triton", "native", "reference") if c in ms)
            ratios = [f"{ms[c] / ours:.1f}x" if c in ms else "" for c in ("eager", "compile")]
            values = [f"{ms[c]:.2f}" if c in ms else "" for c in shown]
            lines.append(f"| {' | '.join([row['function'], row['case'], str(row['n']), *values, *ratios])} |")
        lines.append("")
    return "\n".join(lines)


def commit():
    """The checkout that was measured; "+" where it differs from that commit."""
    git = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def setting(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {capability}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, process CPU time"


@pytest.mark.parametrize(("op", "case", "device"), RUNS)
def bench_op(op, case, device, rows, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "")
    providers = {}
    for backend in dispatch.available(op, device.type):
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        assert cases.error(case, device) <= case.tolerance
        providers[backend] = Provider(cases.public(case), case, device, backend)
    function = plain(case, device)
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
    rows.append({
        "function": case.function, "case": case.name, "device": device.type, "setting": setting(device),
        "n": len(provider.seconds), "ms": {name: round(p.ms, 4) for name, p in providers.items()},
        "bytes_moved": case.bytes_moved, "flops": case.flops, "commit": commit(),
    })  # fmt: skip
