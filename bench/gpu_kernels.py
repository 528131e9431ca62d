"""The Triton kernels on a GPU: first right, then fast. ``bench/gpu_day.sh`` runs it; by hand:

    python bench/gpu_kernels.py check              every case of every op against the reference in float64
    python bench/gpu_kernels.py time [--ops ...]   sizes of a training step: Triton, eager reference, torch.compile

A case is timed only after its results agree with the reference. Times are medians of replayed CUDA graphs, where an op
can be captured. GB/s is the least traffic of the forward pass (each input byte read once, each output
byte written once) divided by its time, and % its share of what a copy of 2 GiB reaches on the same GPU.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

import fastmim_kernels  # noqa: E402
from fastmim_kernels import cases, dispatch  # noqa: E402

BF16 = torch.bfloat16
GPU = torch.device("cuda")


def spec(op: str):
    return importlib.import_module(f"fastmim_kernels.{op}.spec")


def training_sizes() -> dict[str, tuple[cases.Case, ...]]:
    """Op -> cases of a step with 1024 images of 224 pixels, ViT-B, mask ratio 0.75, unless said otherwise."""
    images, window = (1024, 3, 256, 256), (224, 224)
    stream = "residual bias prenorm"
    return {
        "masks": (spec("masks").random_case(1024, 196, 49), spec("masks").cell_case(1024, (14, 14), 2, 17)),
        "patches": (spec("patches").case(images, 16, window, keep=49, dtype=BF16),),
        "gather": (spec("gather").case(1024, 196, 49, 768, BF16),),
        "restore": (
            spec("restore").case(1024, 196, 49, 512, dtype=BF16, parameters=BF16),
            spec("restore").case(1024, 196, 49, 512, dtype=BF16),
        ),
        "pixel_loss": (spec("pixel_loss").case(images, 16, 147, window, dtype=BF16),),
        "infonce": tuple(spec("infonce").case(n, n, 256, dtype=BF16) for n in (4096, 16384)),
        "layer_norm": (
            *(spec("layer_norm").case((1024, 197, d), stream, BF16, BF16) for d in (384, 512, 768, 1024, 1280)),
            spec("layer_norm").case((1024, 197, 768), "residual bias scale rows prenorm", BF16, BF16),
        ),
        "activation": (spec("activation").case((1024, 50, 3072), True, BF16),),
        "topk": tuple(spec("topk").case(128, 12, 196, k, 64, dtype=BF16) for k in (49, 98)),
        "mixing": (
            spec("mixing").mix_case((1024, 3, 224, 224), 16, 4, dtype=BF16),
            spec("mixing").unmix_case(256, 196, 4, 512, dtype=BF16),
        ),
        "patch_contrast": (spec("patch_contrast").case(256, 196, 768, 4, dtype=BF16),),
        "token_loss": (spec("token_loss").case(50176, 768, 8192, dtype=BF16),),
        "views": (spec("views").case((256, 3, 256, 256), window, spec("views").ALL, BF16),),
        "ema": (spec("ema").case("ViT-B_12_blocks", 12 * spec("ema").BLOCK, 0.996),),
        "adamw": (
            spec("adamw").case("ViT-B_12_blocks", 12 * spec("ema").BLOCK),
            spec("adamw").case("ViT-B_12_blocks_bf16", 12 * spec("ema").BLOCK, grad=BF16, copy=BF16),
        ),
        "resize": (spec("resize").case((256, 3, 320, 320), window, is_normalized=True, dtype=BF16),),
    }


def backend(name: str) -> None:
    """Force a backend for the calls that follow."""
    os.environ[dispatch.VARIABLE] = name


def check(ops: list[str]) -> int:
    """Print every failure; returns their number."""
    failures = count = 0
    for op in ops:
        small, large = cases.load(op)
        for case in small:
            backend("triton")
            try:
                error = cases.error(case, GPU)
            except Exception as e:
                error = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
            if isinstance(error, str) or not error <= case.tolerance:
                failures += 1
                print(f"WRONG {op:14} {case.function} {case.name}: {error}, tolerance {case.tolerance}", flush=True)
        failures += sum(differs_from_eager(op, case) for case in large)
        count += len(small) + len(large)
        torch.cuda.empty_cache()
    print(f"{count - failures} of {count} cases are right", flush=True)
    return failures


# Share of values that may differ by more than rounding. topk: which of two keys is the K-th best hangs on the order of
# summation where their scores agree to 6 digits, about once in 10,000 rows.
ALLOWED = {"topk": 1e-3}


def differs_from_eager(op: str, case: cases.Case) -> bool:
    """Whether results or gradients differ from the reference's in the same dtype by more than both are rounded."""
    got = {}
    try:
        for name in ("reference", "triton"):
            backend(name)
            got[name] = cases.call(cases.public(case), case, case.inputs(GPU))
    except Exception as e:
        print(f"WRONG {op:14} {case.function} {case.name}: {type(e).__name__}: {str(e).splitlines()[0][:200]}")
        return True
    values = wrong = 0
    worst = 0.0
    for ours, theirs in zip(got["triton"], got["reference"], strict=True):
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
    from triton.testing import do_bench, do_bench_cudagraph

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    if is_captured:
        return statistics.median(do_bench_cudagraph(step, rep=100, return_mode="all"))
    return float(do_bench(step, warmup=25, rep=100, return_mode="median"))


def copy_bandwidth() -> float:
    """GB/s, read and written, of a copy of 2 GiB: the ceiling of kernels that move data."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=GPU)
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
    backend("triton" if provider == "triton" else "reference")
    function = cases.public(case)
    if provider == "compile":
        torch._dynamo.reset()
        function = torch.compile(function)
    try:
        forward, both = steps(case, function)
        is_captured = provider == "triton" or op not in WAITING
        row: dict[str, float | str] = {"forward_ms": median_ms(forward, is_captured)}
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
        torch.cuda.empty_cache()


def compare(ops: list[str], providers: list[str], seconds: float, out: pathlib.Path | None) -> int:
    sizes, start = training_sizes(), time.monotonic()
    ceiling = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{importlib.import_module('triton').__version__}; a copy moves {ceiling:.0f} GB/s; ms, forward | with backward"
    )
    print(f"{'op':14} {'case':66} {'GB/s':>6} {'%':>4} " + " ".join(f"{p:>18}" for p in providers) + "  MiB")
    failures = 0
    for op in (op for op in ops if op in sizes):
        for case in sizes[op]:
            if time.monotonic() - start > seconds:
                print(f"stopped before {op} {case.name}: {seconds:.0f} seconds are over")
                return failures
            if differs_from_eager(op, case):
                failures += 1
                continue
            rows = {provider: measure(op, case, provider) for provider in providers}
            ours = rows["triton"]
            rate = case.bytes_moved / ours["forward_ms"] / 1e6 if "forward_ms" in ours else 0.0
            cells = " ".join(f"{cell(rows[p]):>18}" for p in providers)
            mib = "/".join(f"{r.get('peak_mib', 0):.0f}" for r in rows.values())
            name = f"{case.function} {case.name}"
            print(f"{op:14} {name:66} {rate:6.0f} {100 * rate / ceiling:4.0f} {cells}  {mib}", flush=True)
            for provider, row in rows.items():
                if "error" in row:
                    print(f"{'':14} {provider}: {row['error']}")
            if out is not None:
                with out.open("a") as file:
                    record = {"op": op, "case": case.name, "function": case.function, "providers": rows}
                    machine = {"gpu": torch.cuda.get_device_name(), "copy_gbs": ceiling, "gbs": rate}
                    print(json.dumps(record | machine), file=file)
    return failures


def cell(row: dict[str, float | str]) -> str:
    if "error" in row:
        return "error"
    return f"{row['forward_ms']:.3f} | {row['both_ms']:.3f}" if "both_ms" in row else f"{row['forward_ms']:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("--ops", default="", help="default: every op that has a Triton kernel")
    parser.add_argument("--providers", default="triton,eager,compile")
    parser.add_argument("--seconds", type=float, default=480, help="no new case is timed after so many seconds")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON line per case is appended to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: expected a GPU that torch sees; run this on a machine that has one.")
        return 2
    package = pathlib.Path(fastmim_kernels.__file__).parent
    ops = (
        options.ops.split(",")
        if options.ops
        else [op for op in dispatch.ops() if (package / op / "kernel.py").exists()]
    )
    if options.what == "check":
        return min(1, check(ops))
    return min(1, compare(ops, options.providers.split(","), options.seconds, options.out))


if __name__ == "__main__":
    sys.exit(main())
