"""Tables (FILE.md) and pictures (FILE.png, with matplotlib) of files of results; nothing is typed by hand.

`python bench/report.py FILE.jsonl ...` writes them beside each file; without a file it writes docs/benchmarks.md and its
pictures from all of bench/results.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import loader_report
import pictures
from points import latest

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
CASE = ("device", "threads", "method", "model", "image_size", "patch_size", "batch_size", "precision")
STEPS = """# Training steps

Written by `fastmim bench step --json {name}`. Ways to take the same step, in turns; what they are is said at the head of
`bench/bench_step.py`. On CPUs, times are process CPU time per thread. n: steps of each; ms: the median, and the 20 % and
80 % points; slower: time of that way over ours, at equal losses (loss error: the largest relative difference to ours before
timing). MFU: FLOPs of the published algorithm over the machine's measured matrix products. launches: what the host
starts in a step, on a CPU operations; kernels: what a GPU runs; syncs: how often the host waits; saved: MiB kept for the
backward pass.
"""
KERNELS = """# Kernels

Written by `fastmim bench kernels --json {name}`. Medians of n interleaved rounds in ms, forward + backward (forward alone where an
op has no gradient). eager, compile: the plain torch of `bench/plain_torch.py`, as it is and through torch.compile. reference,
native, triton: the backends of `fastmim_kernels`. The ratios are those of plain torch to the backend that runs by default.
at ceiling: what the forward pass would take at the machine's ceilings (each byte moved once, products at full speed) over what
it takes; above 100 % where tensors stay in a CPU's caches.
"""
GPU_KERNELS = """# Kernels on a GPU

Written by `bench/gpu_kernels.py time`. Medians of replayed CUDA graphs in ms, forward | with backward; GB/s: the least traffic of
the forward pass over its time, and its share of what a copy reaches.
"""
CHECKS = """# Kernels against the reference

Written by `bench/gpu_kernels.py check`.

| op | cases | wrong | device | torch |
|---|---|---|---|---|
"""
E2E = """# Whole runs

Written by `fastmim bench e2e --json {name}`: a run of the trainer on images, and one on synthetic images, after their first third.

| data | flags | steps | device | images/s | without images | share | waiting |
|---|---|---|---|---|---|---|---|
"""
PROFILES = """# Where a step's time goes

Written by `bench/profile_step.py`: operations (on a GPU: kernels) by their own time, from torch's profiler.
"""
BACKENDS = ("triton", "native", "reference")
COLUMNS = ("eager", "compile", "reference", "native", "triton")
# What we aim at on an H200 with bf16: share of the measured matrix products, images per second. Set before anything was
# measured, from the FLOPs and the bytes of each method.
TARGETS = {
    ("mae", "vit_base"): (0.60, 8100), ("mae", "vit_large"): (0.66, 4200), ("cmae", "vit_base"): (0.57, 4000),
    ("cae", "vit_base"): (0.45, 2200), ("mixedae", "vit_base"): (0.53, 7100), ("icmae", "vit_base"): (0.55, 6100),
}  # fmt: skip


# ---- training steps


def steps_page(records: list[dict], name: str) -> str:
    """One table per machine, one line per case and way."""
    lines = [STEPS.format(name=name)]
    points = latest((r for r in records if r["suite"] in ("step", "missing")), lambda r: (*_case(r), r["provider"]))
    steps = [r for r in points if r["suite"] == "step"]
    for (device, threads, torch), own in groupby(sorted(steps, key=_machine), key=_machine):
        own = list(own)
        lines += [f"## {device}, {threads} thread(s), torch {torch}\n", _ceilings(records, (device, threads, torch))]
        lines += ["| case | way | n | ms (20 %, 80 %) | images/s | MFU | slower | loss error | launches | kernels | syncs | saved |",
                  "|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for _, points_of_case in groupby(sorted(own, key=_case), key=_case):
            found = list(points_of_case)
            ours = next(r["ms"] for r in found if r["provider"] == "ours")
            lines += [_row(r, ours) for r in sorted(found, key=lambda r: r["ms"])]
        lines += [
            "",
            *_absent([r for r in points if r["suite"] == "missing" and _machine(r) == (device, threads, torch)]),
        ]
        if "H200" in device:
            lines += _targets([r for r in own if r["provider"] in ("ours", "graph")])
    return "\n".join(lines)


def _ceilings(records: list[dict], machine: tuple) -> str:
    found = [r for r in records if r["suite"] == "ceiling" and _machine(r) == machine]
    if not found:
        return "Ceilings: not measured.\n"
    best = {key: max(r[key] for r in found) for key in ("matmul_tflops", "copy_gb_s")}
    spread = max(1 - min(r["matmul_tflops"] for r in found) / best["matmul_tflops"], 0)
    return (f"Ceilings: products {best['matmul_tflops']:.3g} TFLOP/s, copies {best['copy_gb_s']:.3g} GB/s; of {len(found)} "
            f"measurements of the products the lowest is {100 * spread:.0f} % below.\n")  # fmt: skip


def _absent(missing: list[dict]) -> list[str]:
    reasons = dict.fromkeys(f"Not measured: {r['provider']} for {r['method']} ({r['why']})." for r in missing)
    return [*reasons, ""] if reasons else []


def _targets(ours: list[dict]) -> list[str]:
    lines = ["| case | way | images/s | aim | MFU | aim | reached |", "|---|---|---|---|---|---|---|"]
    for (method, model), (share, speed) in TARGETS.items():
        for r in (r for r in ours if (r["method"], r["model"]) == (method, model)):
            lines.append(f"| {case_name(r)} | {r['provider']} | {r['images_per_s']:.0f} | {speed} | {100 * r['mfu_measured']:.0f} % | "
                         f"{100 * share:.0f} % | {100 * r['images_per_s'] / speed:.0f} % |")  # fmt: skip
    return [*lines, ""] if len(lines) > 2 else []


def _machine(record: dict) -> tuple:
    return record["device"], record["threads"], record["torch"]


def _case(record: dict) -> tuple:
    return tuple(record[key] for key in CASE)


def case_name(record: dict) -> str:
    return "{method} {model}/{patch_size} {image_size}px b{batch_size} {precision}".format(**record)


def _row(r: dict, ours: float) -> str:
    def number(key: str, form: str, factor: float = 1) -> str:
        return "" if r.get(key) is None else format(factor * r[key], form)

    cells = [
        case_name(r), r["provider"], r["n"], f"{r['ms']:.1f} ({r['ms_20']:.1f}, {r['ms_80']:.1f})", f"{r['images_per_s']:.1f}",
        number("mfu_measured", ".0f", 100) + " %", f"{r['ms'] / ours:.2f}x", number("loss_error", ".1e"),
        number("launches", "d"), number("kernels", "d"), number("host_syncs", "d"), number("saved_mib", ".0f"),
    ]  # fmt: skip
    return f"| {' | '.join(str(c) for c in cells)} |"


# ---- kernels


def kernels_page(records: list[dict], name: str) -> str:
    """One line per case, one table per machine."""
    lines = [KERNELS.format(name=name)]
    for where in dict.fromkeys(r["setting"] for r in records if r["suite"] == "kernels"):
        own = sorted((r for r in records if r.get("setting") == where), key=lambda r: r["function"])
        shown = [c for c in COLUMNS if any(c in r["ms"] for r in own)]
        lines += [f"## {where}\n", f"| op | case | n | {' | '.join(shown)} | vs eager | vs compile | at ceiling |"]
        lines.append("|---|---|---|" + "---|" * (len(shown) + 3))
        roofs = pictures.roofs(records)
        for r in own:
            ms = r["ms"]
            ours = next(ms[c] for c in BACKENDS if c in ms)
            ratios = [f"{ms[c] / ours:.1f}x" if c in ms else "" for c in ("eager", "compile")]
            values = [f"{ms[c]:.2f}" if c in ms else "" for c in shown]
            share = pictures.share_of_roof(r, roofs)
            end = "" if share is None else f"{100 * share:.0f} %"
            lines.append(f"| {' | '.join([r['function'], r['case'], str(r['n']), *values, *ratios, end])} |")
        lines.append("")
    return "\n".join(lines)


def gpu_kernels_page(records: list[dict], name: str) -> str:
    lines = [GPU_KERNELS]
    own = [r for r in records if r["suite"] == "gpu kernels"]
    for device in dict.fromkeys(r["device"] for r in own):
        found = [r for r in own if r["device"] == device]
        ways = list(dict.fromkeys(way for r in found for way in r["providers"]))
        lines += [f"## {device}, torch {found[0]['torch']}\n", f"| op | case | GB/s | of a copy | {' | '.join(ways)} |"]
        lines.append("|---|---|---|---|" + "---|" * len(ways))
        for r in found:
            cells = [_pair(r["providers"].get(way)) for way in ways]
            share = f"{100 * r['gb_s'] / r['copy_gb_s']:.0f} %"
            lines.append(f"| {r['function']} | {r['case']} | {r['gb_s']:.0f} | {share} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _pair(row: dict | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "error"
    return f"{row['forward_ms']:.3f}" + (f" / {row['both_ms']:.3f}" if "both_ms" in row else "")


def checks_page(records: list[dict], name: str) -> str:
    own = [r for r in records if r["suite"] == "check"]
    return CHECKS + "".join(
        f"| {r['op']} | {r['cases']} | {r['wrong']} | {r['device']} | {r['torch']} |\n" for r in own
    )


# ---- whole runs


def e2e_pairs(records: list[dict]) -> list[tuple[dict, dict]]:
    """(run on images, run without) of each case."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in records:
        found.setdefault((r["data"], tuple(r["flags"]), r["steps"], r["device"]), {})[r["source"]] = r
    return [(runs["real"], runs["synthetic"]) for runs in found.values() if len(runs) == 2]


def e2e_page(records: list[dict], name: str) -> str:
    lines = [E2E.format(name=name)]
    for real, bare in e2e_pairs([r for r in records if r["suite"] == "e2e"]):
        share = real["images_per_s"] / bare["images_per_s"]
        lines.append(f"| {real['data']} | `{' '.join(real['flags'])}` | {real['steps']} | {real['device']}, {real['threads']} "
                     f"thread(s) | {real['images_per_s']:.0f} | {bare['images_per_s']:.0f} | {100 * share:.0f} % | "
                     f"{100 * real['data_wait']:.1f} % |\n")  # fmt: skip
    return "".join(lines)


# ---- profiles


def profiles_page(records: list[dict], name: str) -> str:
    lines = [PROFILES]
    for r in (r for r in records if r["suite"] == "profile"):
        lines += [
            f"## {r['device']}: {case_name(r)}, {r['provider']}\n",
            "| of a step | ms | calls | name |",
            "|---|---|---|---|",
        ]
        lines += [f"| {100 * t['share']:.1f} % | {t['ms']:.3f} | {t['calls']:.0f} | `{t['name']}` |" for t in r["top"]]
        lines.append("")
    return "\n".join(lines)


# ---- files


def loaders_page(records: list[dict], name: str) -> str:
    return loader_report.page(records, name)


PAGES = {
    "step": steps_page, "kernels": kernels_page, "gpu kernels": gpu_kernels_page, "check": checks_page, "loader": loaders_page,
    "e2e": e2e_page, "profile": profiles_page,
}  # fmt: skip


def read(path: Path) -> tuple[str, list[dict]]:
    """(suite, records) of a file of results; ('', []) for another file."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return next((r["suite"] for r in records if r.get("suite") in PAGES), ""), records
    except (ValueError, AttributeError):
        return "", []


def write_report(path: Path) -> None:
    """The tables and the picture of a file, beside it."""
    suite, records = read(path)
    if suite:
        path.with_suffix(".md").write_text(PAGES[suite](records, path.name))
        pictures.draw(suite, records, path.with_suffix(".png"))


INTRODUCTION = """# Benchmarks

Written by `python bench/report.py` from the files of `bench/results`; a test compares. Every number comes from a run on the
machine that its section names. `fastmim bench step|kernels|loader|e2e --json FILE` measures anew, `bash bench/gpu_day.sh` on a
GPU; [bench/NOTES.md](../bench/NOTES.md) has what was expected, what came out, and why.
"""


def document(results: Path) -> str:
    """docs/benchmarks.md."""
    parts = [INTRODUCTION]
    for path in sorted(results.rglob("*.jsonl")):
        suite, records = read(path)
        if suite:
            place = path.relative_to(results)
            picture = f"![{place.stem}](benchmarks/{_flat(place)})\n\n" if pictures.has_picture(suite, records) else ""
            head, _, rest = PAGES[suite](records, f"bench/results/{place}").partition("\n")
            parts.append(f"#{head}: `{place}`\n\n{picture}{rest.strip().replace(chr(10) + '## ', chr(10) + '### ')}\n")
    return "\n".join(parts)


def _flat(place: Path) -> str:
    return str(place.with_suffix(".png")).replace("/", "-")


def main(argv: list[str]) -> None:
    if argv:
        for name in argv:
            write_report(Path(name))
        return
    DOCUMENT.write_text(document(RESULTS))
    DOCUMENT.with_suffix("").mkdir(exist_ok=True)
    for path in sorted(RESULTS.rglob("*.jsonl")):
        suite, records = read(path)
        pictures.draw(suite, records, DOCUMENT.with_suffix("") / _flat(path.relative_to(RESULTS)))


if __name__ == "__main__":
    main(sys.argv[1:])
