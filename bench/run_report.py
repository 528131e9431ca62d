"""Tables of the records of bench_e2e.py, bench_engines.py and profile_step.py."""

from points import origin
from step_report import case_name

E2E = """# Whole runs

Written by `fastmim bench e2e --json {name}`: a run of the trainer on images, and one on synthetic images, after their first third;
n: intervals of the log.

| data | flags | steps | n | device | images/s | without images | share | waiting |
|---|---|---|---|---|---|---|---|---|
"""
ENGINES = """# Engines

Written by `pytest bench/bench_engines.py`: the same step in every engine with one process, in turns; the ratio is the median of
the rounds' ratios. Process CPU time.
"""
PROFILES = """# Where a step's time goes

Written by `bench/profile_step.py`: operations (on a GPU: kernels) by their own time, from torch's profiler, of the fastest of n
steps. step: the fastest without the profiler, on a CPU in process CPU time per thread; on a GPU, what the kernels leave of it is
waiting for launches.
"""


def e2e_pairs(records: list[dict]) -> list[tuple[dict, dict]]:
    """(run on images, run without) of each case."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in records:
        found.setdefault((r["data"], tuple(r["flags"]), r["steps"], r["device"]), {})[r["source"]] = r
    return [(runs["real"], runs["synthetic"]) for runs in found.values() if len(runs) == 2]


def e2e_page(records: list[dict], name: str) -> str:
    own = [r for r in records if r["suite"] == "e2e"]
    lines = [E2E.format(name=name)]
    for real, bare in e2e_pairs(own):
        share = real["images_per_s"] / bare["images_per_s"]
        lines.append(f"| {real['data']} | `{' '.join(real['flags'])}` | {real['steps']} | {real['n']} | {real['device']} | "
                     f"{real['images_per_s']:.0f} | {bare['images_per_s']:.0f} | {100 * share:.0f} % | "
                     f"{100 * real['data_wait']:.1f} % |\n")  # fmt: skip
    return "".join([*lines, f"\n{origin(own)}.\n"])


def engines_page(records: list[dict], name: str) -> str:
    lines = [ENGINES]
    own = [r for r in records if r["suite"] == "engines"]
    for case in dict.fromkeys(r["case"] for r in own):
        found = [r for r in own if r["case"] == case]
        lines += [f"## {case}\n", f"{origin(found)}.\n", "| engine | ms per step | of single |", "|---|---|---|"]
        lines += [f"| {r['engine']} | {r['ms']:.0f} | {r['ratio']:.3f} |" for r in found]
        lines.append("")
    return "\n".join(lines)


def profiles_page(records: list[dict], name: str) -> str:
    """By kind of operation, the ways of a case side by side; then the operations of each way."""
    lines = [PROFILES]
    own = [r for r in records if r["suite"] == "profile"]
    for case in dict.fromkeys((r["device"], case_name(r)) for r in own):
        found = {r["provider"]: r for r in own if (r["device"], case_name(r)) == case}
        lines += [f"## {case[0]}: {case[1]}\n", f"{origin(list(found.values()))}.\n", *kinds_table(found), ""]
        for way, r in found.items():
            lines += [f"| {way}: of a step | ms | calls | name |", "|---|---|---|---|"]
            lines += [
                f"| {100 * t['share']:.1f} % | {t['ms']:.3f} | {t['calls']:.0f} | `{t['name']}` |" for t in r["top"]
            ]
            lines.append("")
    return "\n".join(lines)


def kinds_table(found: dict[str, dict]) -> list[str]:
    """Milliseconds of a step by kind of operation, a column per way."""
    names = dict.fromkeys(kind for r in found.values() for kind in r.get("kinds", ()))
    if not names:
        return []
    sums = {way: {**r["kinds"], "all": sum(r["kinds"].values()), "step": r["step_ms"]} for way, r in found.items()}
    order = sorted(names, key=lambda kind: -max(each.get(kind, 0) for each in sums.values()))
    return [
        f"| ms of | {' | '.join(sums)} |", "|---|" + "---|" * len(sums),
        *(f"| {kind} | {' | '.join(f'{each.get(kind, 0):.2f}' for each in sums.values())} |" for kind in (*order, "all", "step")),
        f"| TFLOP/s of torch's products | {' | '.join(format(r.get('products_tflops', 0), '.3g') for r in found.values())} |",
    ]  # fmt: skip
