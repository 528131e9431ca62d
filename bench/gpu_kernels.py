"""The Triton kernels on a GPU: first right, then fast. ``bench/gpu_day.sh`` runs it; by hand:

    python bench/gpu_kernels.py check              every case of every op against the reference in float64
    python bench/gpu_kernels.py time [--ops ...]   sizes of a training step: Triton, eager reference, torch.compile

A case is timed only after its results agree with the reference. Times are medians of replayed CUDA graphs, where an op
can be captured. GB/s is the least traffic of the forward pass (each input byte read once, each output
byte written once) divided by its time, and % its share of what a copy of 2 GiB reaches on the same GPU.

With ``--out FILE`` a run that was broken off goes on where it stopped. It needs torch and Triton, and nothing else.
Without a GPU, the native kernels take Triton's place, at sizes of 8 images: a rehearsal, whose times mean nothing.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from fastmim_kernels import cases, dispatch  # noqa: E402
from points import Points  # noqa: E402
from sizes import training_sizes  # noqa: E402

IS_GPU = torch.cuda.is_available()
GPU = torch.device("cuda" if IS_GPU else "cpu")
REHEARSED = "native" if "native" in dispatch.available("gather", "cpu") else "reference"
OURS, IMAGES = ("triton", 1024) if IS_GPU else (REHEARSED, 8)
DEVICE_NAME = torch.cuda.get_device_name() if IS_GPU else "CPU"


def backend(name: str) -> None:
    """Force a backend for the calls that follow."""
    os.environ[dispatch.VARIABLE] = name


def has_ours(op: str) -> bool:
    return OURS in dispatch.available(op, GPU.type)


def check(ops: list[str], points: Points) -> int:
    """Prints every failure; returns their number. Ops that the file has are not checked again."""
    failures = count = 0
    for op in ops:
        if points.has(lambda r: (r.get("suite"), r.get("op")), ("check", op)):
            print(f"{op}: in the file already", flush=True)
            continue
        small, large = cases.load(op)
        large = large if IS_GPU else ()
        backend(OURS)
        wrong = sum(is_wrong(op, case) for case in small) + sum(differs_from_eager(op, case) for case in large)
        points.add([{"suite": "check", "op": op, "cases": len(small) + len(large), "wrong": wrong, "device": DEVICE_NAME,
                     "torch": torch.__version__}])  # fmt: skip
        failures, count = failures + wrong, count + len(small) + len(large)
        empty_cache()
    print(f"{count - failures} of {count} cases are right", flush=True)
    return sum(r["wrong"] for r in points.records if r.get("suite") == "check" and r["op"] in ops)


def is_wrong(op: str, case: cases.Case) -> bool:
    try:
        error = cases.error(case, GPU)
    except Exception as e:
        error = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    wrong = isinstance(error, str) or not error <= case.tolerance
    if wrong:
        print(f"WRONG {op:14} {case.function} {case.name}: {error}, tolerance {case.tolerance}", flush=True)
    return wrong


def empty_cache() -> None:
    if IS_GPU:
        torch.cuda.empty_cache()


# Share of values that may differ by more than rounding. topk: which of two keys is the K-th best hangs on the order of
# summation where their scores agree to 6 digits, about once in 10,000 rows.
ALLOWED = {"topk": 1e-3}


def differs_from_eager(op: str, case: cases.Case) -> bool:
    """Whether results or gradients differ from the reference's in the same dtype by more than both are rounded."""
    got = {}
    try:
        for name in ("reference", OURS):
            backend(name)
            got[name] = cases.call(cases.public(case), case, case.inputs(GPU))
    except Exception as e:
        print(f"WRONG {op:14} {case.function} {case.name}: {type(e).__name__}: {str(e).splitlines()[0][:200]}")
        return True
    values = wrong = 0
    worst = 0.0
    for ours, theirs in zip(got[OURS], got["reference"], strict=True):
        difference = (ours.double() - theirs.double()).abs_().div_(theirs.double().abs_().clamp_min_(1))
        difference.nan_to_num_(nan=float("inf"))
        values, wrong = values + difference.numel(), wrong + int((difference > 2 * case.tolerance).sum())
        worst = max(worst, float(difference.max()) if difference.numel() else 0.0)
    is_wrong = wrong > ALLOWED.get(op, 0) * values
    if is_wrong:
        print(f"WRONG {op:14} {case.function} {case.name}: {wrong} of {values} values differ, by up to {worst:.2g}")
    return is_wrong


# Whose reference waits for the device, so that a CUDA graph cannot hold it.
WAITING = {"views"}


def median_ms(step, is_captured: bool = True) -> float:
    """Of a replayed CUDA graph, else of plain launches."""
    if not IS_GPU:
        return _rehearsed_ms(step)
    from triton.testing import do_bench, do_bench_cudagraph

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    if is_captured:
        return statistics.median(do_bench_cudagraph(step, rep=100, return_mode="all"))
    return float(do_bench(step, warmup=25, rep=100, return_mode="median"))


def _rehearsed_ms(step) -> float:
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def copy_bandwidth() -> float:
    """GB/s, read and written, of a copy of 2 GiB: the ceiling of kernels that move data."""
    source = torch.empty(1 << 31 if IS_GPU else 1 << 22, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


def steps(case: cases.Case, function):
    """(forward, forward and backward or None) of a case as functions without arguments."""
    inputs = case.inputs(GPU)
    sources = [inputs[name].requires_grad_() for name in case.grads]

    def forward():
        with torch.no_grad():
            return function(**inputs)

    if not sources:
        return forward, None
    with torch.no_grad():
        outputs = [o for o in cases.flatten(function(**inputs)) if o.is_floating_point()]
    grads = [torch.ones_like(o) for o in outputs]

    def both():
        outputs = [o for o in cases.flatten(function(**inputs)) if o.requires_grad]
        return torch.autograd.grad(outputs, sources, grads[: len(outputs)])

    return forward, both


def measure(op: str, case: cases.Case, provider: str) -> dict[str, float | str]:
    backend(provider if provider == OURS else "reference")
    function = cases.public(case)
    if provider == "compile":
        torch._dynamo.reset()
        function = torch.compile(function)
    try:
        forward, both = steps(case, function)
        is_captured = provider == OURS or op not in WAITING
        row: dict[str, float | str] = {"forward_ms": median_ms(forward, is_captured)}
        if IS_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (both or forward)()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if both:
            row["both_ms"] = median_ms(both, is_captured)
        return row
    except Exception as e:
        return {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    finally:
        empty_cache()


def compare(ops: list[str], providers: list[str], seconds: float, points: Points) -> int:
    """Times what the file lacks; returns the number of cases that were wrong."""
    sizes, start = training_sizes(IMAGES), time.monotonic()
    ceiling = copy_bandwidth()
    print(f"{DEVICE_NAME}, torch {torch.__version__}; a copy moves {ceiling:.0f} GB/s; ms, forward | with backward")
    print(f"{'op':14} {'case':66} {'GB/s':>6} {'%':>4} " + " ".join(f"{p:>18}" for p in providers) + "  MiB")
    failures = 0
    for op, case in [(name, case) for name in ops for case in sizes.get(name, ())]:
        key = (op, case.function, case.name, *providers)
        if points.has(lambda r: (r.get("op"), r.get("function"), r.get("case"), *r.get("providers", ())), key):
            continue
        if time.monotonic() - start > seconds:
            print(f"stopped before {op} {case.name}: {seconds:.0f} seconds are over; the same command goes on")
            break
        if differs_from_eager(op, case):
            failures += 1
            continue
        rows = {provider: measure(op, case, provider) for provider in providers}
        ours = rows[OURS]
        rate = case.bytes_moved / ours["forward_ms"] / 1e6 if "forward_ms" in ours else 0.0
        cells = " ".join(f"{cell(rows[p]):>18}" for p in providers)
        mib = "/".join(f"{r.get('peak_mib', 0):.0f}" for r in rows.values())
        print(
            f"{op:14} {case.function + ' ' + case.name:66} {rate:6.0f} {100 * rate / ceiling:4.0f} {cells}  {mib}",
            flush=True,
        )
        for provider, row in rows.items():
            if "error" in row:
                print(f"{'':14} {provider}: {row['error']}")
        points.add([{
            "suite": "gpu kernels", "op": op, "case": case.name, "function": case.function, "providers": rows,
            "bytes_moved": case.bytes_moved, "flops": case.flops, "device": DEVICE_NAME, "torch": torch.__version__,
            "copy_gb_s": ceiling, "gb_s": rate,
        }])  # fmt: skip
    return failures


def cell(row: dict[str, float | str]) -> str:
    if "error" in row:
        return "error"
    return f"{row['forward_ms']:.3f} | {row['both_ms']:.3f}" if "both_ms" in row else f"{row['forward_ms']:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--ops", default="", help="default: every op that has a kernel here")
    parser.add_argument("--providers", default="ours,eager,compile")
    parser.add_argument("--seconds", type=float, default=480, help="no new case is timed after so many seconds")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON line per case is appended to this file")
    options = parser.parse_args()
    ops = options.ops.split(",") if options.ops else [op for op in dispatch.ops() if has_ours(op)]
    points = Points(options.out)
    if options.what == "check":
        return min(1, check(ops, points))
    providers = [OURS if name == "ours" else name for name in options.providers.split(",")]
    return min(1, compare(ops, providers, options.seconds, points))


if __name__ == "__main__":
    sys.exit(main())
