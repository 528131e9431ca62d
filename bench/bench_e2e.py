"""Whole runs: what a step with real images costs beside one with synthetic ones.

`python bench/bench_e2e.py --data DIR --json FILE --steps 200 [flags of fastmim train]`: trains from the images with the
loader that `auto` picks, then on random images, each in a process of its own; compares images per second after the first
third, and how long the device waited for data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from bench_step import DEVICE, machine
from fastmim_pipelines.demo import write_demo

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--method", "mae", "--preset", "demo", "--batch-size", "32"]


def train(flags: list[str], steps: int, out: Path) -> list[dict]:
    """The metrics of a run, those of its first third left out."""
    command = [sys.executable, str(ROOT / "fastmim" / "train.py"), *flags, "--steps", str(steps), "--out", str(out),
               "--log-every", str(max(1, steps // 20)), "--save-every", str(steps)]  # fmt: skip
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launcher}
    subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "images_per_s" in r and r["step"] > steps // 3]


def compare(data: Path, flags: list[str], steps: int) -> dict:
    sources = {"real": ["--data", str(data)], "synthetic": ["--loader", "synthetic"]}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train([*flags, *source], steps, Path(folder) / name) for name, source in sources.items()}
    speed = {name: statistics.median(r["images_per_s"] for r in records) for name, records in runs.items()}
    wait = statistics.mean(r["data_wait"] for r in runs["real"])
    return {
        "suite": "e2e", "flags": flags, "steps": steps, "n": len(runs["real"]), "images_per_s": speed["real"],
        "synthetic_images_per_s": speed["synthetic"], "share": speed["real"] / speed["synthetic"], "data_wait": wait,
        **machine(),
    }  # fmt: skip


def show(record: dict) -> None:
    print(f"  {' '.join(record['flags'])}: {record['images_per_s']:.0f} images/s, {100 * record['share']:.0f} % of "
          f"{record['synthetic_images_per_s']:.0f} without real images; the device waited {100 * record['data_wait']:.1f} % "
          f"of the time (n={record['n']} intervals)")  # fmt: skip


def bench_e2e(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("photos")
    write_demo(folder, images=200, val_images=20, seed=0)
    print()
    show(compare(folder / "train", SMALL, steps=200 if DEVICE.type == "cuda" else 24))


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole runs on real and on synthetic images.",
                                     epilog="Other flags are those of `fastmim train`.")  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="adds a line to it")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default 300)")
    args, flags = parser.parse_known_args()
    record = compare(args.data, flags or SMALL, args.steps)
    show(record)
    if args.json is not None:
        with open(args.json, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
