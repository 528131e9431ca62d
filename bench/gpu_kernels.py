"""The Triton kernels on a GPU: first right, then fast. ``bench/gpu_day.sh`` runs it; by hand:

    python bench/gpu_kernels.py check              every case of every op against the reference in float64
    python bench/gpu_kernels.py time [--ops ...]   sizes of a training step: Triton, eager reference, torch.compile

A case is timed only after its results agree with the reference. Times are medians, with their 20 % and 80 % points, of
replayed CUDA graphs, where an op can be captured; `launched`: the same with ordinary launches and a cold L2 cache. GB/s is the least traffic of the forward pass (each input byte read once, each output
byte written once) divided by its time, and % its share of what a copy of 2 GiB reaches on the same GPU.

With ``--out FILE`` a run that was broken off goes on where it stopped. Without a GPU, the native kernels take Triton's place, at sizes of 8 images: a rehearsal, whose times mean nothing.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

import torch
from fastmim_kernels import cases, dispatch
from machine import DEVICE as GPU
from machine import IS_GPU, allocated, between_ceilings, machine
from points import Points, latest
from sizes import training_sizes
from step_report import MACHINE

REHEARSED = "native" if "native" in dispatch.available("gather", "cpu") else "reference"
OURS, IMAGES = ("triton", 1024) if IS_GPU else (REHEARSED, 8)


def backend(name: str) -> None:
    """Force a backend for the calls that follow."""
    os.environ[dispatch.VARIABLE] = name


def has_ours(op: str) -> bool:
    return OURS in dispatch.available(op, GPU.type)


def check(ops: list[str], points: Points) -> int:
    """Prints every failure; returns the number of ops' last ones. What was right at this commit is not checked again."""
    failures = count = 0
    for op in ops:
        if points.has(check_key, check_key(machine() | {"suite": "check", "op": op, "wrong": 0})):
            print(f"{op}: in the file already", flush=True)
            continue
        small, large = cases.load(op)
        large = large if IS_GPU else ()
        backend(OURS)
        wrong = sum(is_wrong(op, case) for case in small) + sum(differs_from_eager(op, case) for case in large)
        points.add([{"suite": "check", "op": op, "cases": len(small) + len(large), "wrong": wrong, **machine()}])  # fmt: skip
        failures, count = failures + wrong, count + len(small) + len(large)
        empty_cache()
    print(f"{count - failures} of {count} cases are right", flush=True)
    checks = [r for r in points.records if r.get("suite") == "check" and r["op"] in ops]
    return sum(r["wrong"] for r in latest(checks, lambda r: (r["op"], *(r[k] for k in MACHINE))))


def check_key(record: dict) -> tuple:
    return tuple(record.get(k) for k in ("suite", "op", "commit", "wrong", *MACHINE))


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


def times(step, is_captured: bool = True) -> dict[str, float]:
    """ms, ms_20 and ms_80 of a replayed CUDA graph, and the median launched_ms of ordinary launches; of these alone, if it
    cannot be captured."""
    if not IS_GPU:
        return _spread([_rehearsed_ms(step)])
    from triton.testing import do_bench, do_bench_cudagraph

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    launched = do_bench(step, warmup=25, rep=100, return_mode="all")
    found = do_bench_cudagraph(step, rep=100, return_mode="all") if is_captured else launched
    return _spread(found) | {"launched_ms": statistics.median(launched)}


def _spread(ms: list[float]) -> dict[str, float]:
    found = sorted(ms)
    return {
        "ms": statistics.median(found),
        "ms_20": found[len(found) // 5],
        "ms_80": found[-1 - len(found) // 5],
        "n": len(found),
    }


def _rehearsed_ms(step) -> float:
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


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
        row: dict[str, float | str] = {f"forward_{k}": v for k, v in times(forward, is_captured).items()}
        if IS_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = allocated()
            (both or forward)()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if both:
            row |= {f"both_{k}": v for k, v in times(both, is_captured).items()}
        return row
    except Exception as e:
        return {"error": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
    finally:
        empty_cache()


def compare(ops: list[str], providers: list[str], seconds: float, points: Points) -> int:
    """Times what the file lacks; returns the number of cases that were wrong."""
    sizes, here = training_sizes(IMAGES), machine()
    todo = [
        (op, case)
        for op in ops
        for case in sizes.get(op, ())
        if not points.has(
            key, key(here | {"op": op, "function": case.function, "case": case.name, "providers": providers})
        )
    ]
    if not todo:
        print("all is in the file already")
        return 0
    start, failures = time.monotonic(), 0
    with between_ceilings(points) as ceiling:
        print(f"{ceiling['device']}, torch {torch.__version__}; ms, forward | with backward; %: of a copy's GB/s")
        print(f"{'op':14} {'case':66} {'GB/s':>6} {'%':>4} " + " ".join(f"{p:>18}" for p in providers) + "  MiB")
        for op, case in todo:
            if time.monotonic() - start > seconds:
                print(f"stopped before {op} {case.name}: {seconds:.0f} seconds are over; the same command goes on")
                break
            if differs_from_eager(op, case):
                failures += 1
                if is_lost():
                    # No kernel runs in this process any more. The record lets the next one pass over the case.
                    points.add([{
                        "suite": "lost", "op": op, "case": case.name, "function": case.function,
                        "providers": dict.fromkeys(providers), **machine(),
                    }])  # fmt: skip
                    sys.exit(
                        f"stopped at {op} {case.name}: the device does not answer; the same command goes on after it"
                    )
                continue
            rows = {provider: measure(op, case, provider) for provider in providers}
            rate = case.bytes_moved / rows[OURS]["forward_ms"] / 1e6 if "forward_ms" in rows[OURS] else 0.0
            points.add([{
                "suite": "gpu kernels", "op": op, "case": case.name, "function": case.function, "providers": rows,
                "n": rows[OURS].get("forward_n", 0), "bytes_moved": case.bytes_moved, "flops": case.flops,
                "copy_gb_s": ceiling["copy_gb_s"], "gb_s": rate, **machine(),
            }])  # fmt: skip
            show(points.records[-1])
    return failures


def is_lost() -> bool:
    """Whether the device answers nothing any more, as after an access out of bounds."""
    try:
        torch.cuda.synchronize() if IS_GPU else None
    except RuntimeError:
        return True
    return False


def key(record: dict) -> tuple | None:
    """A case that cost the device is tried again at another commit."""
    if record.get("suite") == "lost" and record["commit"] != machine()["commit"]:
        return None
    return tuple(record.get(k) for k in ("op", "function", "case", *MACHINE)), *record.get("providers", ())


def show(r: dict) -> None:
    rows, share = r["providers"], 100 * r["gb_s"] / r["copy_gb_s"]
    cells = " ".join(f"{cell(row):>18}" for row in rows.values())
    mib = "/".join(f"{row.get('peak_mib', 0):.0f}" for row in rows.values())
    print(f"{r['op']:14} {r['function'] + ' ' + r['case']:66} {r['gb_s']:6.0f} {share:4.0f} {cells}  {mib}", flush=True)
    for provider, row in rows.items():
        if "error" in row:
            print(f"{'':14} {provider}: {row['error']}")


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
