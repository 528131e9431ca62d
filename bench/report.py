"""Tables (FILE.md) and pictures (FILE.png, with matplotlib) of files of results; nothing is typed by hand.

`python bench/report.py FILE.jsonl ...` writes them beside each file; without a file it writes docs/benchmarks.md and its
pictures from all of bench/results.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import kernel_report
import loader_report
import pictures
import run_report
import step_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
PAGES: dict[str, Callable[[list[dict], str], str]] = {
    "step": step_report.page, "kernels": kernel_report.kernels_page, "gpu kernels": kernel_report.gpu_kernels_page,
    "check": kernel_report.checks_page, "loader": loader_report.page, "e2e": run_report.e2e_page,
    "engines": run_report.engines_page, "profile": run_report.profiles_page,
}  # fmt: skip


def read(path: Path) -> tuple[str, list[dict]]:
    """(suite, records) of a file of results, without a line that a kill tore; ('', []) for another file."""
    try:
        records = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
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

Not compared: Liger, xformers, FlagGems and FlexAttention as peers of kernels; stable-pretraining as one of steps; SPDL, Streaming
and ESSL as loaders. Not measured: FLOPs with recomputation (HFU), views per second, joules per image, the ceiling of fp8 products;
on CPUs, wall time beside process time.
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
