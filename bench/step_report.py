"""Tables of the records of bench_step.py."""

import math
from itertools import groupby

from points import latest, origin

MACHINE = ("device", "threads", "torch")
CASE = (*MACHINE, "method", "model", "image_size", "patch_size", "batch_size", "precision")
# Ceilings that move by more make their run void. Source: the protocol in NOTES.md.
MOST_DRIFT = 0.03
HEAD = """# Training steps

Written by `fastmim bench step --json {name}`. Ways to take the same step, in turns; what they are is said at the head of
`bench/bench_step.py`. On CPUs, times are process CPU time per thread. n: turns of each, of a step, or where that is
short of as many as take 0.2 s; ms of a step: the median, and the 20 % and
80 % points; slower: that way's time over ours, the median of the rounds' ratios, at equal losses (loss error: the largest
relative difference to ours before timing, over `checked` steps). MFU: FLOPs of the published algorithm over the machine's measured matrix products, and over its datasheet.
A dash: void, because the ceilings moved by more than {drift:.0f} % during that run, or it was broken off before they were measured again.
launches: what the host starts in a step, on a CPU operations; kernels: what a GPU runs; syncs: how often the host waits;
saved: MiB kept for the backward pass, of the largest micro-batch; parts: micro-batches of a step, of which all are counted (a row
without: launches, syncs and saved are those of one pass over the whole batch, which a CPU's step of ours may cut). peak: MiB of
GPU memory; first: seconds until the first step is done, compilation included.
"""
# What we aim at on an H200 with bf16: share of the measured matrix products, images per second. Set before anything was
# measured, from the FLOPs and the bytes of each method.
PIXELS, TOKENS = "cae", "cae with DALL-E's tokenizer"
TARGETS = {
    ("mae", "vit_base"): (0.60, 8100), ("mae", "vit_large"): (0.66, 4200), ("cmae", "vit_base"): (0.57, 4000),
    (PIXELS, "vit_base"): (0.58, 4150), (TOKENS, "vit_base"): (0.45, 2200), ("mixedae", "vit_base"): (0.53, 7100),
    ("icmae", "vit_base"): (0.55, 6100),
}  # fmt: skip
# Of a run whose ceilings moved.
VOID, IN_VOID_RUNS = "-", ("images_per_s", "mfu_measured", "mfu_datasheet")
# Heading, key of a record, format, factor; columns in which a table has nothing are left out.
COLUMNS = (
    ("n", "n", "d", 1), ("ms", "ms", ".1f", 1), ("20 %", "ms_20", ".1f", 1), ("80 %", "ms_80", ".1f", 1),
    ("images/s", "images_per_s", ".1f", 1), ("MFU", "mfu_measured", ".0f %", 100), ("of datasheet", "mfu_datasheet", ".0f %", 100),
    ("slower", "slower", ".2fx", 1), ("loss error", "loss_error", ".1e", 1), ("checked", "checked", "d", 1), ("launches", "launches", "d", 1),
    ("kernels", "kernels", "d", 1), ("syncs", "host_syncs", "d", 1), ("saved", "saved_mib", ".0f", 1), ("parts", "counted_parts", "d", 1),
    ("peak", "peak_mib", ".0f", 1), ("first", "first_step_s", ".1f", 1),
)  # fmt: skip


def page(records: list[dict], name: str) -> str:
    """One table per machine, one line per case and way."""
    lines = [HEAD.format(name=name, drift=100 * MOST_DRIFT)]
    steps = steps_of(records)
    missing = latest((r for r in records if r["suite"] in ("step", "missing")), lambda r: (*case_of(r), r["provider"]))
    missing = [r for r in missing if r["suite"] == "missing"]
    for machine, own in groupby(sorted(steps, key=_machine), key=_machine):
        own = sorted(own, key=case_of)
        lines += [f"## {own[0]['device']}, {own[0]['threads']} thread(s)\n", f"{origin(own)}.\n"]
        lines.append(f"{ceilings([r for r in records if r['suite'] == 'ceiling' and _machine(r) == machine])}\n")
        lines += _commands(own)
        lines += [*_table(own), ""]
        lines += _absent([r for r in missing if _machine(r) == machine])
        if "H200" in own[0]["device"]:
            lines += _targets([r for r in own if r["provider"] in ("ours", "graph")])
    return "\n".join(lines)


def steps_of(records: list[dict]) -> list[dict]:
    """The last record of each case and way, with `is_void`: whether what hangs on the machine's speed does not count."""
    found, is_void = [], True
    # Backwards: the ceilings that close a run have the drift, those that open it have none.
    for r in reversed(records):
        if r["suite"] == "ceiling":
            is_void = not r.get("drift", math.inf) <= MOST_DRIFT
        elif r["suite"] == "step":
            found.append({**r, "is_void": is_void})
    return latest(reversed(found), lambda r: (*case_of(r), r["provider"]))


def ceilings(found: list[dict]) -> str:
    """A sentence on the ceilings of one machine."""
    if not found:
        return "Ceilings: not measured."
    products, copies = (max(r[key] for r in found) for key in ("matmul_tflops", "copy_gb_s"))
    text = f"Ceilings: products {products:.3g} TFLOP/s, copies {copies:.3g} GB/s."
    drifts = [r["drift"] for r in found if "drift" in r]
    wrong = [d for d in drifts if d > MOST_DRIFT]
    if wrong:
        text += (f" In {len(wrong)} of {len(drifts)} runs they moved by more than {100 * MOST_DRIFT:.0f} %, at most by "
                 f"{100 * max(wrong):.0f} %: shares of them and images per second are void there, ratios of ways, which took "
                 "turns, are not.")  # fmt: skip
    elif drifts:
        text += f" Over {len(drifts)} run(s) they moved by {100 * max(drifts):.1f} % at most."
    return text


def _commands(own: list[dict]) -> list[str]:
    known = dict.fromkeys(r["command"] for r in own if "command" in r)
    rest = sum("command" not in r for r in own)
    lines = ["Measured by:\n", *(f"- `{command}`" for command in known), ""] * bool(known)
    return lines + [f"Of {rest} of {len(own)} rows the command was not recorded.\n"] * bool(rest)


def _table(own: list[dict]) -> list[str]:
    rows = []
    for _, points in groupby(own, key=case_of):
        found = sorted(points, key=lambda r: r["ms"])
        ours = next((r["ms"] for r in found if r["provider"] == "ours"), None)
        rows += [{"slower": r["ms"] / ours if ours else None} | r for r in found]
    shown = [column for column in COLUMNS if any(r.get(column[1]) is not None for r in rows)]
    return [
        f"| case | way | {' | '.join(title for title, *_ in shown)} |",
        f"|---|---|{'---|' * len(shown)}",
        *(f"| {case_name(r)} | {r['provider']} | {' | '.join(_cell(r, *column) for column in shown)} |" for r in rows),
    ]


def _cell(r: dict, title: str, key: str, form: str, factor: int) -> str:
    if r.get(key) is None:
        return ""
    if r["is_void"] and key in IN_VOID_RUNS:
        return VOID
    form, unit = form.rstrip("x %"), form[len(form.rstrip("x %")) :]
    return format(factor * r[key], form) + unit


def _absent(missing: list[dict]) -> list[str]:
    reasons = dict.fromkeys(f"Not measured: {r['provider']} for {r['method']} ({r['why']})." for r in missing)
    return [*reasons, ""] if reasons else []


def _targets(ours: list[dict]) -> list[str]:
    lines = ["| case | way | aim of | images/s | aim | MFU | aim | reached |", "|---|---|---|---|---|---|---|---|"]
    for (name, model), (share, speed) in TARGETS.items():
        for r in (r for r in ours if (aim_of(r), r["model"]) == (name, model)):
            reached = (
                f"{r['images_per_s']:.0f}",
                f"{100 * r['mfu_measured']:.0f} %",
                f"{100 * r['images_per_s'] / speed:.0f} %",
            )
            images, mfu, part = (VOID,) * 3 if r["is_void"] else reached
            lines.append(
                f"| {case_name(r)} | {r['provider']} | {name} | {images} | {speed} | {mfu} | {100 * share:.0f} % | {part} |"
            )
    if len(lines) == 2:
        return []
    pixels, tokens = (TARGETS[name, "vit_base"] for name in (PIXELS, TOKENS))
    about = (
        "The aims of CAE ViT-B: {:.0%} and {} images/s where it predicts pixels, {:.0%} and {} with DALL-E's tokenizer."
    )
    return [*lines, "", about.format(*pixels, *tokens), ""]


def aim_of(record: dict) -> str:
    """Of TARGETS: the method, and for CAE what it predicts. A record without `options` is the paper preset, which has no
    tokenizer."""
    has_tokenizer = record["method"] == "cae" and (record.get("options") or {}).get("tokenizer") is not None
    return TOKENS if has_tokenizer else record["method"]


def _machine(record: dict) -> tuple:
    return tuple(record[key] for key in MACHINE)


def case_of(record: dict) -> tuple:
    return tuple(record[key] for key in CASE)


def case_name(record: dict) -> str:
    return "{method} {model}/{patch_size} {image_size}px b{batch_size} {precision}".format(**record)
