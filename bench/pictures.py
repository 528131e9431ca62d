"""Pictures of records of results, with matplotlib: bars per method, a roofline per kernel, bars per loader."""

import math
import statistics
import textwrap
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import loader_report
from kernel_report import roofs, share_of_roof
from points import origin
from step_report import MOST_DRIFT, case_name, case_of, steps_of

# Inches: a row of bars, its frame (title, axis, legend), a letter of a label of 7 points.
ROW, FRAME, LETTER = 0.2, 1.3, 0.066
# Between groups, in rows.
GAP = 0.7


def has_picture(suite: str, records: list[dict]) -> bool:
    return suite in DRAW and (suite != "kernels" or any(share_of_roof(r, roofs(records)) for r in records))


def draw(suite: str, records: list[dict], path: Path) -> None:
    """Writes the picture of a suite, if it has one and matplotlib is installed."""
    if not has_picture(suite, records):
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        print(f"no {path.name}: pip install matplotlib")
        return
    figure = DRAW[suite](records, plt)
    # No version and no date inside: the same numbers give the same file. Tight: nothing of a label or legend is cut.
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


def _bars(plt, labels: list[str], rows: float | None = None, above: float = 0):
    """(figure, axes, axes above): for horizontal bars from top to bottom, as high as there are rows and as wide as the
    labels need; with axes of another kind above where a height in inches is given, else None."""
    rows = rows or len(labels)
    width, height = 6 + LETTER * max(map(len, labels)), FRAME + ROW * rows
    if above:
        figure, (top, axes) = plt.subplots(
            2, figsize=(width, above + height), height_ratios=(above, height), layout="constrained"
        )
    else:
        (figure, axes), top = plt.subplots(figsize=(width, height), layout="constrained"), None
    axes.tick_params(labelsize=7)
    axes.set_ylim(rows - 0.4, -0.6)
    return figure, axes, top


def _title(axes, text: str, about: str) -> None:
    axes.set_title("\n".join([text, *textwrap.wrap(about, 110, break_on_hyphens=False)]), fontsize=8, loc="left")


def _legend(figure, axes, columns: int) -> None:
    """Below the axes, where no bar can be."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


# ---- training steps


def draw_steps(records: list[dict], plt):
    """The time of every way over ours, a group of bars per case; images per second where they are not void."""
    steps = steps_of(records)
    cases = [list(points) for _, points in groupby(sorted(steps, key=case_of), key=case_of)]
    colors = dict(zip(dict.fromkeys(r["provider"] for r in steps), plt.get_cmap("tab20").colors))
    where = len({r["device"] for r in steps}) > 1
    names = [case_name(points[0]) + f"\n{points[0]['device']}" * where for points in cases]
    figure, axes, _ = _bars(plt, names, rows=len(steps) + GAP * (len(cases) - 1))
    y, ticks, longest = 0.0, [], 1.0
    for points, name in zip(cases, names):
        start, ours = y, next((r["ms"] for r in points if r["provider"] == "ours"), None)
        for r in sorted(points, key=lambda r: r["ms"]):
            slower = r.get("slower") or (r["ms"] / ours if ours else math.nan)
            speed = "" if r["is_void"] else f", {r['images_per_s']:.1f} images/s"
            axes.barh(y, slower, 0.85, color=colors[r["provider"]])
            axes.text(
                0 if math.isnan(slower) else slower,
                y,
                f" {r['provider']} {slower:.2f}x{speed}",
                va="center",
                fontsize=7,
            )
            longest = max(longest, 0 if math.isnan(slower) else slower)
            y += 1
        ticks.append(((start + y - 1) / 2, name))
        y += GAP
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(0, 1.35 * longest)
    axes.axvline(1, color="black", linewidth=0.7, linestyle=":")
    axes.set_xlabel("time of a step over ours, median of the rounds' ratios", fontsize=8)
    few = f"images per second where the machine's ceilings moved by {100 * MOST_DRIFT:.0f} % at most"
    _title(axes, f"Training steps: time over ours; {few}", origin(steps))
    return figure


# ---- kernels


def draw_kernels(records: list[dict], plt):
    """The share of the ceiling that each op's forward pass reaches; above, the roofline with every op that computes."""
    roof = roofs(records)
    own = [r for r in records if r["suite"] == "kernels"]
    shares = [(share_of_roof(r, roof), r) for r in own]
    shares = sorted(((s, r) for s, r in shares if s is not None), key=lambda pair: pair[0])
    points = [
        (r["flops"] / r["bytes_moved"], _speed(share, r, roof), r["function"]) for share, r in shares if r["flops"]
    ]
    names = [f"{r['function']} {r['case']}" for _, r in shares]
    figure, bars, above = _bars(plt, names, above=4.5 if points else 0)
    bars.barh(range(len(shares)), [100 * s for s, _ in shares], color="tab:blue")
    bars.set_yticks(range(len(shares)), names)
    bars.set_xlabel("forward pass, % of the ceiling (above 100: tensors stay in caches)", fontsize=8)
    if points:
        _roofline(above, points, roof, plt.get_cmap("tab20").colors)
    _title(above or bars, "Kernels at the machine's ceilings", origin(own))
    return figure


def _speed(share: float, r: dict, roof: tuple[float, float]) -> float:
    """FLOP/s of a forward pass that reaches a share of its ceiling."""
    return r["flops"] * share / max(r["flops"] / roof[0], r["bytes_moved"] / roof[1])


def _roofline(axes, points: list[tuple[float, float, str]], roof: tuple[float, float], colors) -> None:
    xs = [x for x, _, _ in points]
    low, ridge, high = min(xs) / 2, roof[0] / roof[1], 2 * max(*xs, roof[0] / roof[1])
    axes.loglog([low, ridge, high], [low * roof[1], roof[0], roof[0]], color="black", linewidth=1)
    for i, name in enumerate(dict.fromkeys(name for _, _, name in points)):
        own = [(x, y) for x, y, n in points if n == name]
        style = {"marker": "osD^v"[i // len(colors) % 5], "color": colors[i % len(colors)], "linestyle": ""}
        axes.loglog([x for x, _ in own], [y for _, y in own], markersize=5, label=name, **style)
    axes.set_xlabel("FLOP per byte (least traffic)", fontsize=8)
    axes.set_ylabel("FLOP/s of the forward pass", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_gpu_kernels(records: list[dict], plt):
    """The share of a copy's speed that each op's forward pass reaches."""
    own = [r for r in records if r["suite"] == "gpu kernels"]
    names = [f"{r['function']} {r['case']}" for r in own]
    figure, axes, _ = _bars(plt, names)
    axes.barh(range(len(own)), [100 * r["gb_s"] / r["copy_gb_s"] for r in own], color="tab:blue")
    axes.set_yticks(range(len(own)), names)
    axes.set_xlabel("GB/s of the forward pass, % of a copy", fontsize=8)
    _title(axes, "Kernels: least traffic over time", origin(own))
    return figure


# ---- loaders


def draw_loaders(records: list[dict], plt):
    """CPU time per image, a group of bars per data set."""
    titles = [t for t in dict.fromkeys(r["data"] for r in records) if t != loader_report.IN_TRAINING]
    found = [(title, row) for title in titles for row in loader_report.rows(records, title) if row["cpu_ms"]]
    names = [row["loader"] for _, row in found]
    figure, axes, _ = _bars(plt, names)
    colors = dict(zip(titles, plt.get_cmap("tab10").colors))
    for y, (title, row) in enumerate(found):
        axes.barh(y, statistics.median(row["cpu_ms"]), color=colors[title], label=title)
    axes.set_yticks(range(len(found)), names)
    axes.set_xlabel("CPU ms per image", fontsize=8)
    _legend(figure, axes, columns=2)
    last = found[-1][1]
    rounds = sorted({len(row["cpu_ms"]) for _, row in found})
    many = f"n = {rounds[0]}" + f" to {rounds[-1]}" * (len(rounds) > 1) + " rounds"
    _title(
        axes, "Loaders: CPU time per image", f"{last['machine']}; {last['versions']}; commit {last['commit']}; {many}"
    )
    return figure


DRAW: dict[str, Callable] = {
    "step": draw_steps, "kernels": draw_kernels, "gpu kernels": draw_gpu_kernels, "loader": draw_loaders,
}  # fmt: skip
