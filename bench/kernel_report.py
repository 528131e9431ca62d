"""Tables of the records of bench_kernels.py and gpu_kernels.py."""

from points import origin
from step_report import ceilings

KERNELS = """# Kernels

Written by `fastmim bench kernels --json {name}`. Medians of n interleaved rounds in ms, forward + backward (forward alone where an
op has no gradient). eager, compile: the plain torch of `bench/plain_torch.py`, as it is and through torch.compile. reference,
native, triton: the backends of `fastmim_kernels`. The ratios are those of plain torch to the backend that runs by default.
at ceiling: what the forward pass would take at the machine's ceilings (each byte moved once, products at full speed) over what
it takes; above 100 % where tensors stay in a CPU's caches.
"""
GPU_KERNELS = """# Kernels on a GPU

Written by `bench/gpu_kernels.py time`. Medians of n replayed CUDA graphs in ms, forward / with backward; (launched): the forward
pass with ordinary launches and a cold L2 cache. GB/s: the least traffic of the forward pass over its time, and its share of
what a copy reaches.
"""
CHECKS = """# Kernels against the reference

Written by `bench/gpu_kernels.py check`.

| op | cases | wrong | device | torch | commit |
|---|---|---|---|---|---|
"""
BACKENDS = ("triton", "native", "reference")
COLUMNS = ("eager", "compile", "reference", "native", "triton")


def kernels_page(records: list[dict], name: str) -> str:
    """One line per case, one table per machine."""
    lines = [KERNELS.format(name=name)]
    found = [r for r in records if r["suite"] == "ceiling"]
    for where in dict.fromkeys(r["setting"] for r in records if r["suite"] == "kernels"):
        own = sorted((r for r in records if r.get("setting") == where), key=lambda r: r["function"])
        shown = [c for c in COLUMNS if any(c in r["ms"] for r in own)]
        lines += [f"## {where}\n", f"{origin(own)}. {ceilings(found)}\n"]
        lines += [f"| op | case | n | {' | '.join(shown)} | vs eager | vs compile | at ceiling |",
                  "|---|---|---|" + "---|" * (len(shown) + 3)]  # fmt: skip
        roof = roofs(records)
        for r in own:
            ms = r["ms"]
            ours = next(ms[c] for c in BACKENDS if c in ms)
            ratios = [f"{ms[c] / ours:.1f}x" if c in ms else "" for c in ("eager", "compile")]
            values = [f"{ms[c]:.2f}" if c in ms else "" for c in shown]
            share = share_of_roof(r, roof)
            end = "" if share is None else f"{100 * share:.0f} %"
            lines.append(f"| {' | '.join([r['function'], r['case'], str(r['n']), *values, *ratios, end])} |")
        lines.append("")
    return "\n".join(lines)


def roofs(records: list[dict]) -> tuple[float, float] | None:
    """(FLOP/s of products, bytes per second of a copy) that a file measured; None without."""
    found = [r for r in records if r.get("suite") == "ceiling"]
    if not found:
        return None
    return max(r["matmul_tflops"] for r in found) * 1e12, max(r["copy_gb_s"] for r in found) * 1e9


def share_of_roof(r: dict, roof: tuple[float, float] | None) -> float | None:
    """Time of a forward pass at the ceilings over the time that it takes."""
    if roof is None or r["suite"] != "kernels" or "forward_ms" not in r:
        return None
    seconds = 1e-3 * next(r["forward_ms"][c] for c in BACKENDS if c in r["forward_ms"])
    return max(r["flops"] / roof[0], r["bytes_moved"] / roof[1]) / seconds


def gpu_kernels_page(records: list[dict], name: str) -> str:
    lines = [GPU_KERNELS]
    own = [r for r in records if r["suite"] == "gpu kernels"]
    for device in dict.fromkeys(r["device"] for r in own):
        found = [r for r in own if r["device"] == device]
        peaks = [r for r in records if r["suite"] == "ceiling" and r["device"] == device]
        ways = list(dict.fromkeys(way for r in found for way in r["providers"]))
        lines += [
            f"## {device}\n",
            f"{origin(found)}. {ceilings(peaks)}\n",
            f"| op | case | GB/s | of a copy | {' | '.join(ways)} |",
        ]
        lines.append("|---|---|---|---|" + "---|" * len(ways))
        for r in found:
            cells = [_cell(r["providers"].get(way)) for way in ways]
            share = f"{100 * r['gb_s'] / r['copy_gb_s']:.0f} %"
            lines.append(f"| {r['function']} | {r['case']} | {r['gb_s']:.0f} | {share} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "error"
    text = f"{row['forward_ms']:.3f}" + (f" / {row['both_ms']:.3f}" if "both_ms" in row else "")
    return text + (f" ({row['forward_launched_ms']:.3f})" if "forward_launched_ms" in row else "")


def checks_page(records: list[dict], name: str) -> str:
    own = [r for r in records if r["suite"] == "check"]
    return CHECKS + "".join(
        f"| {r['op']} | {r['cases']} | {r['wrong']} | {r['device']} | {r['torch']} | {r.get('commit', '')} |\n"
        for r in own
    )
