"""Whole runs: what a step with real images costs beside one with synthetic ones.

`fastmim bench e2e --data DIR --json FILE --steps 200 [flags of fastmim train]`: trains on the images with the loader that
`auto` picks, then on random images, each in a process of its own; compares images per second after the first third, and how
long the device waited for data. Without --data it draws pictures of the size of ImageNet's. A line per run is added as soon
as it is over; a run that the file has is not made again.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fastmim_pipelines.demo import DemoSpec
from machine import IS_GPU, machine
from photos import drawn
from points import Points
from report import write_report
from run_report import e2e_pairs

from fastmim.bench import Parser, at_least, exit_code, results_file
from fastmim.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# The smallest that is a run: what `pytest bench` takes, and the default.
SMALL = ["--method", "mae", "--preset", "demo", "--batch-size", "32"]
DRAWN = "drawn"
SOURCES = ("real", "synthetic")


def train(flags: list[str], steps: int, out: Path) -> list[dict]:
    """The metrics of a run, those of its first third left out.

    Raises:
        RuntimeError: the run failed.
    """
    command = [sys.executable, str(ROOT / "fastmim" / "train.py"), *flags, "--steps", str(steps), "--out", str(out),
               "--log-every", str(max(1, steps // 20)), "--save-every", f"{steps}st"]  # fmt: skip
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in launcher}
    done = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "images_per_s" in r and r["step"] > steps // 3]


def run(data: Path, name: str, flags: list[str], steps: int, points: Points) -> None:
    """Adds the runs that the file lacks.

    Args:
        name: of the data, in the file.
    """
    for source, more in zip(SOURCES, (["--data", str(data)], ["--loader", "synthetic"])):
        about = {"data": name, "flags": flags, "steps": steps, "source": source}
        if points.has(key, key(machine() | about)):
            print(f"  {source}: in the file already")
            continue
        with tempfile.TemporaryDirectory() as folder:
            # --data alone would choose the paper's preset.
            preset = [] if "--preset" in flags else ["--preset", "paper"]
            records = train([*preset, *flags, *more], steps, Path(folder) / "run")
        points.add([{
            "suite": "e2e", **about, "n": len(records),
            "images_per_s": statistics.median(r["images_per_s"] for r in records),
            "data_wait": statistics.mean(r["data_wait"] for r in records), **machine(),
        }])  # fmt: skip


def key(record: dict) -> tuple:
    return tuple(record.get("flags", ())), *(
        record.get(k) for k in ("data", "steps", "source", "device", "threads", "torch")
    )


def show(records: list[dict]) -> None:
    for real, synthetic in e2e_pairs(records):
        share = real["images_per_s"] / synthetic["images_per_s"]
        print(f"  {real['data']}, {' '.join(real['flags'])}: {real['images_per_s']:.0f} images/s, {100 * share:.0f} % of "
              f"{synthetic['images_per_s']:.0f} without real images; the device waited {100 * real['data_wait']:.1f} % of the "
              f"time (n={real['n']} intervals)")  # fmt: skip


def bench_e2e(results, tmp_path):
    points = Points(results / "e2e.jsonl")
    run(drawn(tmp_path, 200, DemoSpec()), DRAWN, SMALL, 200 if IS_GPU else 60, points)
    print()
    show(points.records)


def main() -> None:
    parser = Parser(prog="fastmim bench e2e", description="Whole runs on real and on synthetic images.",
                    epilog="Other flags are those of `fastmim train`.")  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder of images; without it, pictures are drawn")
    parser.add_argument("--drawn", type=at_least(1), default=400, metavar="N", help="pictures to draw (default 400)")
    parser.add_argument(
        "--json", type=results_file, metavar="FILE", help="where the lines go; runs in it are not made again"
    )
    parser.add_argument("--steps", type=at_least(3), default=300, help="of each run (default 300)")
    args, flags = parser.parse_known_args()
    if args.data is not None and not args.data.exists():
        raise ConfigError(f"--data: expected a folder of images, found none at {args.data}")
    points = Points(args.json)
    with tempfile.TemporaryDirectory() as folder:
        data, name = args.data, str(args.data)
        if data is None:
            data, name = drawn(Path(folder), args.drawn), f"{args.drawn} {DRAWN}"
        run(data, name, flags or SMALL, args.steps, points)
    show(points.records)
    if args.json is not None:
        write_report(args.json)


if __name__ == "__main__":
    sys.exit(exit_code(main))
