"""The table of `ladder.py`: its rows, where they come from, and the Markdown and JSON that are written."""

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "pillow", "safetensors")


@dataclass
class Row:
    """One run, or one of the two baselines."""

    name: str
    seed: int | None = None
    command: str = ""
    error: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    """Terms of the loss over the last log interval."""
    knn_top1: float | None = None
    linear_top1: float | None = None
    linear_weight_decay: float | None = None
    epochs: float | None = None
    images_seen: int | None = None
    images_per_s: float | None = None
    seconds: float | None = None
    """Of the training process, from its start to its end."""


def provenance(args: argparse.Namespace, argv: list[str], ruler, shares: list[list[int]]) -> dict:
    """What one needs to repeat the table. `ruler` and `shares`: see ladder.py."""
    import torch

    from fastmim import __version__
    from fastmim.device import cpu_capability

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changes = git("status", "--porcelain", "--untracked-files=no")
    is_cpu = ruler.device.type == "cpu"
    device = (
        f"CPU, {cpu_capability()}, {sum(map(len, shares))} cores; "
        f"{len(shares)} runs at a time with {len(shares[0])} each"
    )
    return {
        "command": shlex.join(["python", "bench/ladder.py", *argv]),
        "commit": git("rev-parse", "--short", "HEAD") + (" with local changes" if changes not in ("", "unknown") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": device if is_cpu else torch.cuda.get_device_name(ruler.device),
        "machine": f"{platform.system()} {platform.machine()}",
        "precision": ruler.precision,
        "versions": {
            "fastmim": __version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "encoder": f"{args.model}/{args.patch_size} at {' x '.join(map(str, ruler.model.image_size))}",
        "train_images": len(ruler.train),
        "val_images": len(ruler.val),
        "classes": len(ruler.train.classes),
        "seeds": args.seeds,
    }  # fmt: skip


def markdown(about: dict, rows: list[Row]) -> str:
    """The table, rows of one method and several seeds joined.

    `about` is that of `provenance`, and when all is done the seconds that it took as a whole.
    """
    n = len(about["seeds"])
    spread = f", n = {n} seeds: mean (lowest to highest)" if n > 1 else ", n = 1"
    error = 100 * (0.25 / about["val_images"]) ** 0.5
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Ladder of methods, {about['date']}",
        "",
        f"`{about['command']}`",
        "",
        f"Commit {about['commit']}; {about['device']}, {about['machine']}, {about['precision']}; {versions}.",
        f"Encoder {about['encoder']}; {about['train_images']} training and {about['val_images']} validation images of "
        f"{about['classes']} classes (chance {100 / about['classes']:.1f} %; standard error of an accuracy at most "
        f"{error:.1f} points){spread}.",
        "",
        "| method | loss at the end | k-NN % | linear % | epochs | images seen | images/s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.name for row in rows):
        group = [row for row in rows if row.name == name]
        failed = [row for row in group if row.error]
        good = [row for row in group if not row.error]
        if good:
            losses = ", ".join(f"{part} {_mean([r.losses[part] for r in good], '.4f')}" for part in good[0].losses)
            cells = [
                losses,
                _mean([r.knn_top1 for r in good], ".1f", 100),
                _mean([r.linear_top1 for r in good], ".1f", 100),
                _mean([r.epochs for r in good], "g"),
                _mean([r.images_seen for r in good], ".0f"),
                _mean([r.images_per_s for r in good], ".0f"),
                _mean([r.seconds for r in good], ".1f", 1 / 60),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for row in failed:
            lines.append(f"| {name} | **failed** (seed {row.seed}): {_one_cell(row.error)} |  |  |  |  |  |  |")
    if "seconds" in about:
        lines += ["", f"Minutes are those of a training; the whole table took {about['seconds'] / 60:.1f}."]
    return "\n".join(lines) + "\n"


def _mean(values: list[float | None], style: str, scale: float = 1.0) -> str:
    """Mean, and the range where there is more than one value; nothing for a row without such a value."""
    if not values or None in values:
        return ""
    scaled = [scale * v for v in values]
    text = format(statistics.fmean(scaled), style)
    if max(scaled) > min(scaled):
        text += f" ({min(scaled):{style}} to {max(scaled):{style}})"
    return text


def _one_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def write(out: Path, about: dict, rows: list[Row]) -> None:
    """Both files, after every row: an interrupted ladder keeps what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(about, rows))
    out.with_suffix(".json").write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
