"""Where a training step's time goes: `python bench/profile_step.py --methods mae --json FILE`, on a CPU or a GPU.

A table of the operations (on a GPU: of the kernels) that take most of a step of ours, by torch.profiler, and how much of the
step they are together. A line per case and way is added to the file; a case that it has is left out.
"""

import argparse
from pathlib import Path

import torch
from bench_step import KEY, MAKE, describe, make_case, why_not
from counters import is_kernel
from machine import DEVICE, IS_GPU, machine
from points import Points
from torch.profiler import ProfilerActivity, profile

from fastmim.device import default_precision
from fastmim.methods import base as methods

STEPS, ROWS = 3, 25


def top(case: dict, way: str) -> list[dict]:
    """Operations by their own time: name, calls and ms of a step, and their share."""
    each = MAKE[way](case)
    for _ in range(2):
        each.prepare()
        each.step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * IS_GPU) as found:
        for _ in range(STEPS):
            each.prepare()
            each.step()
        if IS_GPU:
            torch.cuda.synchronize()
    rows = [(e.key, e.count, _own_us(e)) for e in found.key_averages() if _own_us(e) > 0]
    whole = sum(us for *_, us in rows)
    rows.sort(key=lambda row: -row[2])
    return [
        {"name": name[:90], "calls": count / STEPS, "ms": us / STEPS / 1e3, "share": us / whole}
        for name, count, us in rows[:ROWS]
    ]


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
        for way in (w for w in args.ways if not why_not(w, method)):
            key = (*(case[k] for k in KEY), way)
            if points.has(lambda r: (*(r.get(k) for k in KEY), r.get("provider")), key):
                print(f"  {describe(case)}, {way}: in the file already")
                continue
            rows = top(case, way)
            points.add([{"suite": "profile", **case, "provider": way, "top": rows, **machine()}])
            print(f"{describe(case)}, {way}: {100 * sum(r['share'] for r in rows):.0f} % of the step")
            for r in rows:
                print(f"  {r['ms']:9.3f} ms {100 * r['share']:5.1f} % {r['calls']:7.1f} x {r['name']}")


if __name__ == "__main__":
    main()
