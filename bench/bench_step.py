"""Training steps side by side: `fastmim bench step --json bench/results/steps-cpu.jsonl`, or `pytest bench -s`.

Ways to take the same step, on the same weights, images and masks, in turns, so that a slow phase of the machine hits all:

    ours       the method in the `single` engine
    graph      the same, the whole step as one CUDA graph (what the trainer does on one GPU)
    blocks     the same with --compile blocks
    fp8        graph with --fp8 wide; fp8-blocks: and with --compile blocks
    plain      the same on plain torch ops: FASTMIM_KERNELS=reference, AdamW tensor by tensor
    official   MAE and CMAE as their official codes compute them (official.py); official-fp32: without autocast
    inductor   official with torch.compile and fused AdamW, attention as it is written
    stock      the same with torch's fused attention: the best of a GPU that needs no kernels; slower than inductor on CPUs
    timm       official with timm's blocks, which have fused attention, and fused AdamW
    hf         transformers' ViTMAE with fused attention and fused AdamW
    lightly    lightly's MAE modules, the same

The last three where they are installed; what is missing is said, in the file, too. On a CPU each way has a process of its
own (turns.py). The losses of several steps must agree before anything is timed. A line of JSON per way and case, added as soon as it is measured: a case that the
file has of this device, torch and number of threads is left as it is there, so that a broken run goes on where it stopped. Times on a CPU are process CPU time per thread. First
and last come the machine's ceilings, a matrix product and a copy.
"""

import os
import statistics
import sys
import time
from contextlib import ExitStack
from operator import truediv
from pathlib import Path

import peers
import report
import torch
from fastmim_kernels import dispatch
from machine import DEVICE, IS_GPU, between_ceilings, machine
from points import Points
from providers import (
    Compiled,
    Fp8,
    Fp8Compiled,
    Graph,
    Inductor,
    OfficialFp32,
    OfficialStyle,
    Ours,
    Plain,
    Stock,
    compile_mode,
)
from step_report import MACHINE
from turns import ABSENT, Apart, Facts, Here

from fastmim.bench import Parser, at_least, config_of, exit_code, results_file
from fastmim.config import ConfigError
from fastmim.device import default_precision
from fastmim.flops import mfu, peak_flops, training_flops
from fastmim.methods import base as methods

MAKE: dict[str, type[Ours]] = {
    "ours": Ours, "graph": Graph, "blocks": Compiled, "fp8": Fp8, "fp8-blocks": Fp8Compiled, "plain": Plain, "official": OfficialStyle, "official-fp32": OfficialFp32, "inductor": Inductor, "stock": Stock,
    "timm": peers.Timm, "hf": peers.HuggingFace, "lightly": peers.Lightly,
}  # fmt: skip
WAYS = tuple(MAKE)
PLACE = Here if IS_GPU else Apart
OTHER, WRONG, BROKEN = "ours, another batch", "its losses differ from ours", "it failed"
# Relative to ours, over the steps before timing.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
KEY = ("method", "model", "image_size", "patch_size", "batch_size", "precision")
LEAST_ROUNDS = 3
# What of the environment changes a measurement.
VARIABLES = ("OMP_NUM_THREADS", "FASTMIM_KERNELS", "FASTMIM_BENCH_COMPILE")


def why_not(way: str, method: str) -> str:
    """'' or the reason why there is no such way to take the method's step here."""
    kind = MAKE[way]
    if kind.takes and method not in kind.takes:
        return f"{way} has {' and '.join(kind.takes)} alone"
    if issubclass(kind, Graph) and not IS_GPU:
        return "CPUs have no CUDA graphs"
    if kind is Inductor and IS_GPU:
        return "stock has the attention that is the faster one on GPUs"
    if way in ("inductor", "stock", "blocks", "fp8-blocks") and compile_mode() == "0":
        return "FASTMIM_BENCH_COMPILE=0"
    return peers.missing(kind.needs) if kind.needs else ""


# ---- measuring


def measure(
    case: dict,
    ways: list[str],
    rounds: int,
    checked: int,
    seconds: float,
    ceiling: dict,
    place: type[Here] | type[Apart],
) -> list[dict]:
    """One record per way, without times where losses differ: there is no speed for another computation.

    Args:
        case: see `make_case`.
        rounds, seconds: of timing, whichever ends first; at least LEAST_ROUNDS rounds.
        checked: steps whose losses are compared first.
        ceiling: of the machine, see `machine.ceilings`.
        place: where ways run, see turns.py.
    """
    # Once: it would take the compiled steps of other ways, too.
    torch._dynamo.reset()
    with ExitStack() as stack:

        def start(way: str, kind: type[Ours], case: dict, checked: int) -> None:
            found[way] = place(kind, case, checked)
            stack.callback(found[way].close)

        found: dict[str, Here | Apart] = {}
        absent = []
        for way in ways:
            try:
                start(way, MAKE[way], case, checked)
            except Exception as e:
                # Whatever another way stumbles over, the rest is still measured.
                if way == "ours":
                    raise
                absent.append(_failed(case, way, e))
        expected = found["ours"].facts.losses
        errors = {
            way: max(abs(a - b) / abs(b) for a, b in zip(each.facts.losses, expected)) for way, each in found.items()
        }
        for way, error in errors.items():
            allowed = max(TOLERANCE[case["precision"]], MAKE[way].tolerance)
            if error > allowed:
                why = f"{WRONG} by {error:.1e}, {allowed:.0e} are allowed"
                absent.append(_missing(case, way, why, is_final=True))
                del found[way]
        if not IS_GPU:
            start(OTHER, Ours, case | {"batch_size": other_batch(found["ours"].facts)}, 2)
        times: dict[str, list[float]] = {way: [] for way in found}
        began = time.perf_counter()
        for _ in range(max(rounds, LEAST_ROUNDS)):
            for way, each in list(found.items()):
                try:
                    times[way].append(each.turn())
                except Exception as e:
                    if way in ("ours", OTHER):
                        raise
                    absent.append(_failed(case, way, e))
                    del found[way], times[way]
            if time.perf_counter() - began > seconds and len(times["ours"]) >= LEAST_ROUNDS:
                break
        other = found.pop(OTHER, None)
        records = [_record(case, way, each, times[way], errors[way], ceiling) for way, each in found.items()]
        for record in records:
            record["slower"] = statistics.median(map(truediv, times[record["provider"]], times["ours"]))
        if other is not None:
            records[0] |= {
                "micro_batches": found["ours"].facts.parts, "other_batch": other.facts.batch_size,
                "other_micro_batches": other.facts.parts, "other_ms": 1e3 * statistics.median(times[OTHER]),
            }  # fmt: skip
        return records + absent


def other_batch(ours: Facts) -> int:
    """A second batch, from which `fastmim plan` learns what of a step does not grow with the batch: a quarter of a
    micro-batch, if that can be, else twice as many images."""
    group = max(2, ours.batch_multiple)
    quarter = ours.batch_size // ours.parts // 4 // group * group
    return quarter or 2 * ours.batch_size


def _record(case: dict, way: str, each: Here | Apart, times: list[float], error: float, ceiling: dict) -> dict:
    rounds = [round(1e3 * t, 4) for t in times]
    ms = sorted(rounds)
    config = config_of(case)
    flops = training_flops(case["method"], config.model_spec(), config.options)
    middle = statistics.median(ms)
    speed = 1e3 * case["batch_size"] / middle
    product = ceiling["matmul_tflops" if case["precision"] == "bf16" else "matmul_fp32_tflops"] * 1e12
    peak = peak_flops(ceiling["device"]) if case["precision"] == "bf16" else None
    return {
        "suite": "step", **case, "provider": way, "backend": ours_on(), "n": len(ms), "rounds_ms": rounds, "ms": middle, "ms_20": ms[len(ms) // 5],
        "ms_80": ms[-1 - len(ms) // 5], "images_per_s": speed, "mfu_measured": mfu(speed, flops, product),
        "mfu_datasheet": mfu(speed, flops, peak), "first_step_s": each.facts.first_step_s, "loss_error": error,
        "checked": len(each.facts.losses),
        **each.counted(), **({"peak_mib": each.facts.peak_mib} if IS_GPU else {}), "processes": processes(each), **machine(),
    }  # fmt: skip


def processes(each: Here | Apart) -> str:
    return "one for each way" if isinstance(each, Apart) else "one for all ways"


def ours_on() -> str:
    """Which kernels our ways run on; the reference says that those for this device are not there."""
    return dispatch.backend_of("layer_norm", DEVICE.type)


def _failed(case: dict, way: str, error: Exception) -> dict:
    """Of a way that could not be made, or broke."""
    words = next(iter(str(error).splitlines()), "")
    is_absent = isinstance(error, ABSENT)
    return _missing(case, way, words if is_absent else f"{BROKEN}: {type(error).__name__}: {words}", is_final=is_absent)


def _missing(case: dict, way: str, why: str, is_final: bool = False) -> dict:
    """Final: not worth another try. A package that is not installed now may be there tomorrow."""
    return {"suite": "missing", **case, "provider": way, "why": why, "is_final": is_final, **machine()}


def run(
    cases: list[dict],
    ways: list[str],
    path: Path | None,
    rounds: int,
    checked: int,
    seconds: float,
    place: type[Here] | type[Apart] = PLACE,
) -> list[dict]:
    """Measures what the file lacks of this machine; returns all records of it. See `measure`."""
    points, here = Points(path), machine()
    command = command_of(cases, ways, rounds, checked, seconds, place)
    wanted = {describe(case): [w for w in ways if not why_not(w, case["method"])] for case in cases}
    todo = [
        case
        for case in cases
        if not all(points.has(_key, _key(here | case | {"provider": w})) for w in wanted[describe(case)])
    ]
    for case in cases:
        if case not in todo:
            print(f"  {describe(case)}: in the file already")
    if not todo:
        return points.records
    print(f"  ours runs on {ours_on()} kernels")
    with between_ceilings(points) as ceiling:
        for case in todo:
            absent = {w: why_not(w, case["method"]) for w in ways}
            try:
                new = measure(case, wanted[describe(case)], rounds, checked, seconds, ceiling, place)
            except torch.OutOfMemoryError as e:
                new = [_missing(case, way, str(e).splitlines()[0], is_final=True) for way in wanted[describe(case)]]
            new = [record | {"command": command} for record in new]
            points.add([*new, *(_missing(case, way, why) for way, why in absent.items() if why)])
            show(case, new, absent)
    return points.records


def _key(record: dict) -> tuple | None:
    # What failed for good may be mended at another commit.
    is_final = record.get("is_final") and record["commit"] == machine()["commit"]
    is_known = record.get("suite", "step") == "step" or is_final
    return tuple(record.get(k) for k in (*KEY, *MACHINE, "provider")) if is_known else None


def command_of(
    cases: list[dict], ways: list[str], rounds: int, checked: int, seconds: float, place: type[Here] | type[Apart]
) -> str:
    """What makes the same records of the same cases on another machine."""
    flags = {name: dict.fromkeys(case[key] for case in cases) for name, key in (
        ("methods", "method"), ("models", "model"), ("batch-sizes", "batch_size"), ("precisions", "precision"),
        ("image-size", "image_size"), ("patch-size", "patch_size"))}  # fmt: skip
    flags |= {"providers": ways, "rounds": [rounds], "checked": [checked], "seconds": [f"{seconds:g}"]}
    words = [f"--{name} {' '.join(map(str, values))}" for name, values in flags.items()]
    environment = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return " ".join([*environment, "fastmim bench step", *words, *["--one-process"] * (place is Here and not IS_GPU)])


def check(case: dict) -> None:
    """Raises:
    ConfigError: no step can be taken with these sizes.
    """
    if case["image_size"] % case["patch_size"]:
        raise ConfigError(
            "--image-size: expected a multiple of --patch-size {patch_size}, got {image_size}".format(**case)
        )
    config = config_of(case)
    with torch.device("meta"):
        multiple = methods.build(case["method"], config.model_spec(), config.options, 0).batch_multiple
    if case["batch_size"] % multiple:
        raise ConfigError(
            f"--batch-sizes: expected multiples of {multiple} for {case['method']}, got {case['batch_size']}"
        )


def show(case: dict, new: list[dict], absent: dict[str, str]) -> None:
    found = [r for r in new if r["suite"] == "step"]
    print(f"  {describe(case)}" + (f", n={found[0]['n']}" if found else ""))
    for r in found:
        print(f"    {r['provider']:11}{r['images_per_s']:9.1f} img/s {r['ms']:9.1f} ms  ours is {r['slower']:5.2f} x  "
              f"{r.get('launches', '-')!s:>6} launches {r.get('host_syncs', '-')!s:>3} syncs "
              f"{r.get('saved_mib', float('nan')):8.0f} MiB saved", flush=True)  # fmt: skip
    reasons = absent | {r["provider"]: r["why"] for r in new if r["suite"] == "missing"}
    for way, why in reasons.items():
        if why:
            print(f"    {way:11}not measured: {why}", flush=True)


def describe(case: dict) -> str:
    return "{method} {model}/{patch_size} at {image_size}, batch {batch_size}, {precision}".format(**case)


def make_case(method: str, model: str, image_size: int, patch_size: int, batch_size: int, precision: str) -> dict:
    return dict(zip(KEY, (method, model, image_size, patch_size, batch_size, precision)))


# ---- the two doors

# (method, model, image size, patch size, batch): the least that says something on a CPU, where compiling takes most of the time.
QUICK = [("mae", "vit_tiny", 224, 16, 8), ("cmae", "vit_tiny", 224, 16, 8)]
QUICK_GPU = [("mae", "vit_base", 224, 16, 256), ("cmae", "vit_base", 224, 16, 128)]


# On a CPU starting ways and compiling them takes most of the time: MAE has all but this, CMAE those that aims are held against.
QUICK_NOT = ("blocks",)
QUICK_CMAE = ("ours", "plain", "official", "inductor")


def quick(index: int, results: Path, told) -> None:
    case = make_case(*(QUICK_GPU if IS_GPU else QUICK)[index], default_precision(DEVICE)[0])
    print()
    ways = WAYS if IS_GPU else QUICK_CMAE if index else [way for way in WAYS if way not in QUICK_NOT]
    # A graph is captured at the fourth step.
    records = run([case], ways, results / "steps.jsonl", rounds=5, checked=6 if IS_GPU else 3, seconds=40)
    own = machine() | case
    found = {r["provider"]: r for r in records if _key(r) == _key(own | {"provider": r.get("provider")}) and "ms" in r}
    told([ms / 1e3 for ms in found["ours"]["rounds_ms"]], {way: r["ms"] / 1e3 for way, r in found.items()})
    assert not mistakes(records), mistakes(records)


def mistakes(records: list[dict]) -> list[str]:
    """Why ways have no times, although they could be made here."""
    return [r["why"] for r in records if r.get("why", "").startswith((WRONG, BROKEN))]


def bench_mae_step(results, told):
    quick(0, results, told)


def bench_cmae_step(results, told):
    quick(1, results, told)


def main() -> int:
    """1 if a way computed something else, or failed.

    Raises:
        ConfigError: an option is out of its range.
    """
    parser = Parser(prog="fastmim bench step", description="Training steps side by side.")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="where the lines go; cases in it are not run again"
    )
    parser.add_argument("--methods", nargs="+", default=methods.available())
    parser.add_argument("--models", nargs="+", default=["vit_base"] if IS_GPU else ["vit_tiny"])
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[256] if IS_GPU else [8])
    parser.add_argument("--precisions", nargs="+", choices=list(TOLERANCE), default=[default_precision(DEVICE)[0]])
    parser.add_argument("--image-size", type=at_least(1), default=224)
    parser.add_argument("--patch-size", type=at_least(1), default=16)
    parser.add_argument("--providers", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=at_least(LEAST_ROUNDS), default=100 if IS_GPU else 10)
    parser.add_argument(
        "--checked", type=at_least(1), default=20, help="steps whose losses are compared first (default 20)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of timing per case, at most (default 60)")
    parser.add_argument("--one-process", action="store_true", help="for all ways, as always on a GPU")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures of the file, beside it")
    args = parser.parse_args()
    if args.report and (args.json is None or not args.json.exists()):
        raise ConfigError("--report: expected --json with a file of results")
    if not args.report:
        cases = [make_case(m, model, args.image_size, args.patch_size, b, p) for m in args.methods for model in args.models
                 for b in args.batch_sizes for p in args.precisions]  # fmt: skip
        for case in cases:
            check(case)
        ways = ["ours", *(w for w in args.providers if w != "ours")]
        records = run(
            cases, ways, args.json, args.rounds, args.checked, args.seconds, Here if args.one_process else PLACE
        )
    if args.json is not None:
        report.write_report(args.json)
    return int(not args.report and bool(mistakes(records)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
