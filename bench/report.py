"""Tables (FILE.md) and pictures (FILE.png, with matplotlib) of the results of bench_step.py; nothing is typed by hand."""

import json
from itertools import groupby
from pathlib import Path

CASE = ("device", "threads", "method", "model", "image_size", "patch_size", "batch_size", "precision")
HEAD = """# Training steps

Written by `fastmim bench step --json {name}`. Ways to take the same step, in turns; what they are is said at the head of
`bench/bench_step.py`. On CPUs, times are process CPU time per thread. n: steps of each; ms: the median, and the 20 % and
80 % points; faster: time of that way over ours, at equal losses (loss error: the largest relative difference to ours before
timing). MFU: FLOPs of the published algorithm over the machine's measured matrix products. ops: operations that a step
starts; syncs: how often the host waits; saved: MiB kept for the backward pass.
"""


def write_report(path: Path) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.with_suffix(".md").write_text(table(records, path.name))
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ModuleNotFoundError:
        print("no picture: pip install matplotlib")
        return
    draw(records, path.with_suffix(".png"))


def table(records: list[dict], name: str) -> str:
    """One table per machine, one line per case and way."""
    lines = [HEAD.format(name=name)]
    steps = [r for r in records if r["suite"] == "step"]
    for (device, threads, torch), own in groupby(sorted(steps, key=_machine), key=_machine):
        found = [r for r in records if r["suite"] == "ceiling" and _machine(r) == (device, threads, torch)]
        best = {key: max(r[key] for r in found) for key in ("matmul_tflops", "copy_gb_s")}
        lines.append(f"## {device}, {threads} thread(s), torch {torch}\n\nCeilings: products {best['matmul_tflops']:.3g} "
                     f"TFLOP/s, copies {best['copy_gb_s']:.3g} GB/s.\n")  # fmt: skip
        lines += ["| case | way | n | ms (20 %, 80 %) | images/s | MFU | faster | loss error | ops | syncs | saved |",
                  "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for _, points in groupby(sorted(own, key=_case), key=_case):
            points = list(points)
            ours = next(r["ms"] for r in points if r["provider"] == "ours")
            lines += [_row(r, ours) for r in sorted(points, key=lambda r: r["ms"])]
        lines.append("")
    return "\n".join(lines)


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
        number("ops", "d"), number("host_syncs", "d"), number("saved_mib", ".0f"),
    ]  # fmt: skip
    return f"| {' | '.join(str(c) for c in cells)} |"


def draw(records: list[dict], path: Path) -> None:
    """Bars: images per second of every way, a group per case."""
    from matplotlib import pyplot as plt

    steps = [r for r in records if r["suite"] == "step"]
    cases = [list(points) for _, points in groupby(sorted(steps, key=_case), key=_case)]
    ways = list(dict.fromkeys(r["provider"] for r in steps))
    colors = dict(zip(ways, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(steps) + 0.2 * len(cases)))
    y, ticks = 0.0, []
    for points in cases:
        start = y
        for r in points:
            axes.barh(y, r["images_per_s"], 0.85, color=colors[r["provider"]])
            axes.text(r["images_per_s"], y, f" {r['provider']} {r['images_per_s']:.1f}", va="center", fontsize=7)
            y += 1
        ticks.append(((start + y - 1) / 2, case_name(points[0])))
        y += 0.7
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("images per second")
    axes.set_title(f"{steps[0]['device']}, {steps[0]['threads']} thread(s)", fontsize=9)
    axes.margins(x=0.18)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
