"""Tables of the records of bench_loader.py."""

import statistics

IN_TRAINING = "in training"
BASE, DALI, FFCV = "Pillow + DataLoader", "DALI, CPU", "FFCV, same bytes"
FOLDER, BETON, PACKED = "fastmim folder", "fastmim beton, same bytes", "fastmim beton, max side 500 q90"
# What we promise: (ours, theirs, at least so many times).
BARS = ((FOLDER, BASE, 2.0), (FOLDER, DALI, 1.7), (BETON, FFCV, 1.4), (PACKED, BASE, 2.5))
LEAST_ROUNDS = 3
SERIES = ("cpu_ms", "images_per_s", "data_wait")
HEAD = """# Loaders on a CPU

Written by `fastmim bench loader --json {name}`. {machine}; {versions}; {decoder}; commit {commit}, {date}.

All contenders give random resized crops of 224 px (scale 0.08..1; bicubic with antialiasing, but for FFCV, which has
area averages alone, and where a row says otherwise) as uint8 batches of 64, from a warm cache, with a worker or thread
per core. Each lives in processes of its own, which are stopped while others run. They take turns, several rounds; a row
holds medians, a ratio is the median of the rounds' ratios. CPU time per image is the figure to compare, images per second
is what a trainer would get here and now.
"""


def rows(records: list[dict], title: str) -> list[dict]:
    """One row per loader measured on the data of a title, with the figures of all rounds."""
    found: dict[str, dict] = {}
    for record in records:
        if record["data"] == title and "missing" not in record:
            row = found.setdefault(record["loader"], {**record, **{key: [] for key in SERIES}})
            for key in SERIES:
                row[key] = row[key] + record.get(key, [])
    return list(found.values())


def page(records: list[dict], name: str = "FILE.jsonl") -> str:
    """Markdown."""
    parts = [HEAD.format(name=name, **records[-1])]
    commands = dict.fromkeys(f"- `{r['command']}`" for r in records if "command" in r)
    parts += ["Measured by:\n\n" + "\n".join(commands) + "\n"] * bool(commands)
    for title in dict.fromkeys(record["data"] for record in records):
        found = rows(records, title)
        if title == IN_TRAINING:
            flags = f" (`fastmim train {found[0]['flags']}`)" if "flags" in found[0] else ""
            parts.append(f"## In training\n\nMedians of the intervals of one run each, without the first; the loader and the model "
                         f"share the cores{flags}.\n\n{_in_training(found)}\n")  # fmt: skip
            continue
        absent = {r["loader"]: r["missing"] for r in records if r["data"] == title and "missing" in r}
        about = f"{found[0]['files']}; " if "files" in found[0] else ""
        rounds = max(len(row["cpu_ms"]) for row in found)
        parts.append(
            f"## {title}\n\n{about}n = {rounds} rounds of {found[0]['images']} images.\n\n{table(found, absent)}\n"
        )
    return "\n".join(parts)


def ratio(found: dict[str, dict], ours: str, theirs: str, key: str) -> float:
    """How many times better the first is; the median of the rounds' ratios."""
    pairs = list(zip(found[ours][key], found[theirs][key]))
    return statistics.median(b / a if key == "cpu_ms" else a / b for a, b in pairs)


def table(found: list[dict], missing: dict[str, str]) -> str:
    lines = [
        "| loader | CPU ms/image (lowest..highest) | less than Pillow's | images/s | more |",
        "|---|---|---|---|---|",
    ]
    by_name = {row["loader"]: row for row in found}
    for name, row in by_name.items():
        costs, rates = row["cpu_ms"], row["images_per_s"]
        cost, rate = statistics.median(costs), statistics.median(rates)
        spread = f"({min(costs):.2f}..{max(costs):.2f})"
        ratios = [f"{ratio(by_name, name, BASE, key):.2f} x" for key in ("cpu_ms", "images_per_s")]
        lines.append(f"| {name} | {cost:.2f} {spread} | {ratios[0]} | {rate:.0f} | {ratios[1]} |")
    if len(found[0]["cpu_ms"]) >= LEAST_ROUNDS:
        lines += ["", *_promises(by_name)]
    lines += ["", *(f"Not measured: {name} ({reason[:160]})." for name, reason in missing.items())]
    return "\n".join(lines).rstrip()


def _promises(by_name: dict[str, dict]) -> list[str]:
    lines = ["| promise | at least | CPU time | images/s | kept |", "|---|---|---|---|---|"]
    for ours, theirs, least in BARS:
        if ours in by_name and theirs in by_name:
            cpu, rate = (ratio(by_name, ours, theirs, key) for key in ("cpu_ms", "images_per_s"))
            kept = "yes" if min(cpu, rate) >= least else "no"
            lines.append(f"| {ours} : {theirs} | {least:g} x | {cpu:.2f} x | {rate:.2f} x | {kept} |")
    return lines


def _in_training(found: list[dict]) -> str:
    lines = ["| loader | images/s | waiting for data |", "|---|---|---|"]
    for row in found:
        rate, wait = (statistics.median(row[key]) for key in ("images_per_s", "data_wait"))
        lines.append(f"| {row['loader']} | {rate:.0f} | {wait:.1%} |")
    return "\n".join(lines)
