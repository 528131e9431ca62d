"""Where a training step's time goes: `python bench/profile_step.py --methods mae --ways ours official --json FILE`.

By torch's profiler, of the fastest of three steps, on a CPU the operations and on a GPU the kernels: first by kind, the ways
side by side, then those that take most of each. A line per case and way is added to the file; a case that it has is left
out.
"""

import argparse
import re
from pathlib import Path

import report
from bench_step import KEY, MAKE, describe, make_case, why_not
from counters import is_kernel
from machine import DEVICE, IS_GPU, clock, machine, seconds_of
from points import Points
from run_report import kinds_table
from step_report import MACHINE
from torch.profiler import ProfilerActivity, profile

from fastmim.device import default_precision
from fastmim.methods import base as methods

STEPS, ROWS = 3, 25
# What a kind is called -> names of torch's operations, of our ops, of kernels of CUDA libraries; the first that is found.
KINDS = {
    "optimizer": r"adamw|Optimizer|lerp|ema_|vector_norm|_foreach|multi_tensor|l2_?norm",
    "attention": r"attention|flash|fmha|softmax|sdpa",
    "convolutions": r"conv|fprop|dgrad|wgrad|depthwise",
    "products": r"mm$|linear(?!_cross)|Product|gemm|matmul|cutlass|nvjet|cublas|splitK|dense",
    "norms": r"norm",
    "activations": r"gelu",
    "masks, views, losses": r"fastmim::|patch|gather|scatter|index|sort|restore|mask|philox|random|view_kernel|color|blur",
    "copies": r"copy|clone|cat$|contiguous|Memcpy|Memset|fill|zero_|CatArray|transpose",
    "pointwise and sums": r"aten::(\w*add|\w*mul|sub|div|sqrt|addc\w+|sum|mean|var|\w*exp|log|pow|where|neg|abs)\b|elementwise|reduce|triton_",
}
OTHER = "starting operations, and others"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profiled(case: dict, way: str) -> dict:
    """What a record has of the fastest of some steps: `top` operations (name, calls, ms, share of all), `kinds` (ms),
    `products_tflops`; and `step_ms`, without the profiler."""
    each = MAKE[way](case)
    for _ in range(5 if way == "graph" else 2):
        each.prepare()
        each.step()
    step_ms = 1e3 * seconds_of(each.step, STEPS)
    whole, events = min((_profile(each) for _ in range(STEPS)), key=lambda found: found[0])
    rows = sorted(((e.key, e.count, _own_us(e) / 1e3) for e in events if _own_us(e) > 0), key=lambda row: -row[2])
    kinds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, _, ms in rows:
        kinds[kind_of(name)] += ms
    top = [{"name": name[:90], "calls": calls, "ms": ms, "share": ms / whole} for name, calls, ms in rows[:ROWS]]
    return {"n": STEPS, "step_ms": step_ms, "kinds": {kind: ms for kind, ms in kinds.items() if ms}, "top": top,
            **_products(events)}  # fmt: skip


def _profile(each) -> tuple[float, list]:
    """(ms of all, events) of one step."""
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * IS_GPU, with_flops=True) as found:
        each.step()
        clock()
    events = found.key_averages()
    return sum(map(_own_us, events)) / 1e3, events


def _products(events) -> dict:
    """TFLOP/s of the matrix products that torch's own operations start."""
    own = [e for e in events if e.flops and kind_of(e.key) == "products"]
    us = sum(e.self_device_time_total if IS_GPU else e.self_cpu_time_total for e in own)
    return {"products_tflops": sum(e.flops for e in own) / us / 1e6} if us else {}


def _own_us(event) -> float:
    """On a GPU the kernels' time alone: the operations that start them would count it again."""
    if IS_GPU:
        return event.self_device_time_total if is_kernel(event) else 0.0
    return event.self_cpu_time_total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--methods", nargs="+", default=methods.available())
    parser.add_argument("--ways", nargs="+", choices=list(MAKE), default=["ours"])
    parser.add_argument("--model", default="vit_base" if IS_GPU else "vit_tiny")
    parser.add_argument("--batch-size", type=int, default=256 if IS_GPU else 8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    args = parser.parse_args()
    points, precision = Points(args.json), default_precision(DEVICE)[0]
    for method in args.methods:
        case = make_case(method, args.model, args.image_size, args.patch_size, args.batch_size, precision)
        new = {}
        for way in args.ways:
            why, key = why_not(way, method), key_of(machine() | case | {"provider": way})
            if why:
                print(f"  {describe(case)}, {way}: not measured: {why}")
            elif points.has(key_of, key):
                print(f"  {describe(case)}, {way}: in the file already")
            else:
                new[way] = {"suite": "profile", **case, "provider": way, **profiled(case, way), **machine()}
                points.add([new[way]])
        show(case, new)
    if args.json is not None:
        report.write_report(args.json)


def key_of(record: dict) -> tuple:
    return tuple(record.get(k) for k in (*KEY, *MACHINE, "provider"))


def show(case: dict, new: dict[str, dict]) -> None:
    print(describe(case), *kinds_table(new), sep="\n  ")
    for way, record in new.items():
        print(f"  {way}:")
        for r in record["top"]:
            print(f"  {r['ms']:9.3f} ms {100 * r['share']:5.1f} % {r['calls']:7.1f} x {r['name']}")


if __name__ == "__main__":
    main()
