"""Real images and real processes for the tests of the trainer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# Small enough for seconds, real in everything else: decoding, two views, decoders, EMA, checkpoints.
TINY = [
    "--preset", "demo", "--stem", "patch", "--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--precision", "fp32",
    "--workers", "0", "--warmup", "0", "--lr", "2e-5", "--device", "cpu", "--log-every", "1",
]  # fmt: skip


def write_images(folder: Path, per_class: int, classes: int = 3, seed: int = 0, side: int = 24) -> Path:
    """JPEGs of smooth random color fields, one folder per class; the class shifts the brightness."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            small = rng.integers(0, 150, (3, 3, 3), dtype=np.uint8) + np.uint8(40 * c)
            image = Image.fromarray(small).resize((side + i % 3, side + 2), Image.Resampling.BICUBIC)
            image.save(folder / f"class{c}" / f"{i:03d}.jpg", quality=92)
    return folder


def environment(**extra: str) -> dict[str, str]:
    """What a user's shell has, with this checkout importable and no launcher's leftovers."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]
    env["PYTHONPATH"] = os.pathsep.join(folders)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["OMP_NUM_THREADS"] = "1"
    return env | extra


def command(launcher: str, processes: int, arguments: list[str]) -> list[str]:
    """`deepspeed`, `torchrun` or `python` in front of fastmim/train.py."""
    bin_folder = Path(sys.executable).parent
    front = {
        "python": [sys.executable],
        "torchrun": [str(bin_folder / "torchrun"), "--standalone", "--nproc-per-node", str(processes)],
        "deepspeed": [str(bin_folder / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(free_port())],
    }[launcher]
    return [*front, str(ROOT / "fastmim" / "train.py"), *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(arguments: list[str], launcher="python", processes=1, timeout=240, **env) -> subprocess.CompletedProcess:
    """Runs the trainer to its end in real processes."""
    return subprocess.run(
        command(launcher, processes, arguments), env=environment(**env), capture_output=True, text=True,
        timeout=timeout, cwd=ROOT,
    )  # fmt: skip


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in metrics(out) if "loss" in record]
