"""Pictures of records of results, with matplotlib: bars per method, a roofline per kernel, bars per loader."""

import statistics
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import loader_report
from points import latest

BACKENDS = ("triton", "native", "reference")


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
    figure.tight_layout()
    # No version and no date inside: the same numbers give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_steps(records: list[dict], plt):
    """Images per second of every way, a group of bars per case."""
    from report import CASE, case_name

    def case_of(r: dict) -> tuple:
        return tuple(r[key] for key in CASE)

    steps = latest((r for r in records if r["suite"] == "step"), lambda r: (*case_of(r), r["provider"]))
    cases = [list(points) for _, points in groupby(sorted(steps, key=case_of), key=case_of)]
    ways = list(dict.fromkeys(r["provider"] for r in steps))
    colors = dict(zip(ways, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(steps) + 0.2 * len(cases)))
    y, ticks = 0.0, []
    for points in cases:
        start = y
        # Methods cost different amounts: each group is drawn against its fastest.
        fastest = max(r["images_per_s"] for r in points)
        for r in points:
            share = r["images_per_s"] / fastest
            axes.barh(y, share, 0.85, color=colors[r["provider"]])
            axes.text(share, y, f" {r['provider']} {r['images_per_s']:.1f}", va="center", fontsize=7)
            y += 1
        ticks.append(((start + y - 1) / 2, case_name(points[0])))
        y += 0.7
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("images per second, of the fastest way of each case")
    axes.set_title(f"{steps[0]['device']}, {steps[0]['threads']} thread(s)", fontsize=9)
    axes.margins(x=0.18)
    return figure


# ---- kernels


def roofs(records: list[dict]) -> tuple[float, float] | None:
    """(FLOP/s of products, bytes per second of a copy) that a file measured; None without."""
    found = [r for r in records if r.get("suite") == "ceiling"]
    if not found:
        return None
    return max(r["matmul_tflops"] for r in found) * 1e12, max(r["copy_gb_s"] for r in found) * 1e9


def share_of_roof(r: dict, ceilings: tuple[float, float] | None) -> float | None:
    """Time of a forward pass at the ceilings over the time that it takes."""
    if ceilings is None or r["suite"] != "kernels" or "forward_ms" not in r:
        return None
    seconds = 1e-3 * next(r["forward_ms"][c] for c in BACKENDS if c in r["forward_ms"])
    return max(r["flops"] / ceilings[0], r["bytes_moved"] / ceilings[1]) / seconds


def draw_kernels(records: list[dict], plt):
    """The roofline with every op that computes, and the share of the ceiling that each op's forward pass reaches."""
    ceilings = roofs(records)
    own = [r for r in records if r["suite"] == "kernels"]
    shares = [(share_of_roof(r, ceilings), r) for r in own]
    shares = sorted(((s, r) for s, r in shares if s is not None), key=lambda pair: pair[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.22 * len(shares)), width_ratios=(1.1, 1))
    points = []
    for share, r in shares:
        if r["flops"] and r["bytes_moved"]:
            bound = max(r["flops"] / ceilings[0], r["bytes_moved"] / ceilings[1])
            points.append((r["flops"] / r["bytes_moved"], r["flops"] * share / bound, r["function"]))
    if points:
        _roofline(left, points, ceilings)
    names = [f"{r['function']} {r['case']}"[:60] for _, r in shares]
    right.barh(range(len(shares)), [100 * s for s, _ in shares], color="tab:blue")
    right.set_yticks(range(len(shares)), names, fontsize=6)
    right.set_xlabel("forward pass, % of the ceiling", fontsize=8)
    figure.suptitle(own[0]["setting"], fontsize=9)
    return figure


def _roofline(axes, points: list[tuple[float, float, str]], ceilings: tuple[float, float]) -> None:
    xs = [x for x, _, _ in points]
    low, ridge, high = min(xs) / 2, ceilings[0] / ceilings[1], 2 * max(*xs, ceilings[0] / ceilings[1])
    axes.loglog([low, ridge, high], [low * ceilings[1], ceilings[0], ceilings[0]], color="black", linewidth=1)
    for name in dict.fromkeys(name for _, _, name in points):
        own = [(x, y) for x, y, n in points if n == name]
        axes.loglog([x for x, _ in own], [y for _, y in own], "o", markersize=4, label=name)
    axes.set_xlabel("FLOP per byte (least traffic)", fontsize=8)
    axes.set_ylabel("FLOP/s of the forward pass", fontsize=8)
    axes.legend(fontsize=6)


def draw_gpu_kernels(records: list[dict], plt):
    """The share of a copy's speed that each op's forward pass reaches."""
    own = [r for r in records if r["suite"] == "gpu kernels"]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.22 * len(own)))
    axes.barh(range(len(own)), [100 * r["gb_s"] / r["copy_gb_s"] for r in own], color="tab:blue")
    axes.set_yticks(range(len(own)), [f"{r['function']} {r['case']}"[:70] for r in own], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of the forward pass, % of a copy", fontsize=8)
    axes.set_title(own[0]["device"], fontsize=9)
    return figure


def draw_loaders(records: list[dict], plt):
    """CPU time per image, a group of bars per data set."""
    titles = [t for t in dict.fromkeys(r["data"] for r in records) if t != loader_report.IN_TRAINING]
    found = [(title, row) for title in titles for row in loader_report.rows(records, title) if row["cpu_ms"]]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(found)))
    colors = dict(zip(titles, plt.get_cmap("tab10").colors))
    for y, (title, row) in enumerate(found):
        axes.barh(y, statistics.median(row["cpu_ms"]), color=colors[title], label=title)
    axes.margins(y=0.01)
    axes.set_yticks(range(len(found)), [row["loader"] for _, row in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("CPU ms per image", fontsize=8)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), fontsize=7)
    axes.set_title(found[0][1]["machine"], fontsize=9)
    return figure


DRAW: dict[str, Callable] = {
    "step": draw_steps, "kernels": draw_kernels, "gpu kernels": draw_gpu_kernels, "loader": draw_loaders,
}  # fmt: skip
