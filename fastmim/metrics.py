"""Measurements of a run: summed on the device, read once per log interval, written as JSON lines."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastmim.dist import mean_over_ranks
from fastmim.extras import require


class Meter:
    """Means of scalars over an interval, without reading the device before `read`."""

    def __init__(self, device: torch.device):
        self.device = device
        # By the names that were added together.
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.counts: dict[tuple[str, ...], int] = {}

    def add(self, **values: Tensor) -> None:
        """Takes scalars, which may be overwritten afterwards."""
        names = tuple(values)
        row = torch.stack([value.detach().float() for value in values.values()])
        self.sums[names] = self.sums[names] + row if names in self.sums else row
        self.counts[names] = self.counts.get(names, 0) + 1

    def read(self) -> dict[str, float]:
        """Means over the interval and all ranks, in one device read; starts the next interval."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for group, row in self.sums.items():
            for name, value in zip(group, row.unbind()):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + self.counts[group]
        names = sorted(sums)
        values = torch.stack([sums[n] / counts[n] for n in names]) if names else torch.zeros(0)
        result = dict(zip(names, mean_over_ranks(values).tolist()))
        self.sums, self.counts = {}, {}
        return result


class Clock:
    """Wall time of an interval: steps, and how long they waited for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def read(self, batch_size: int) -> dict[str, float]:
        """images_per_s, step_ms and data_wait (share of the time, 0..1) since the last call."""
        elapsed = max(time.perf_counter() - self.began, 1e-9)
        result = {
            "images_per_s": batch_size * self.steps / elapsed,
            "step_ms": 1e3 * elapsed / max(1, self.steps),
            "data_wait": self.waited / elapsed,
        }
        self.reset()
        return result


def peak_mib(device: torch.device) -> float:
    """Largest memory so far in MiB: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int):
        lines = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    kept = json.loads(line)["step"] <= resumed_step
                except (ValueError, KeyError):
                    continue  # the last line of a killed run may be half written
                if kept:
                    lines.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, path)
        self.file = open(path, "a")  # noqa: SIM115 - open for the length of the run

    def write(self, record: dict) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def check_tracker(name: str | None) -> None:
    """Raises ConfigError with the line that installs the tracker's package if it is missing."""
    if name is not None:
        require(name, name)


def open_tracker(name: str | None, folder: Path) -> Callable[[dict], None]:
    """A function that also sends each record to TensorBoard or Weights & Biases."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda record: [writer.add_scalar(k, v, record["step"]) for k, v in _scalars(record)] and None
    if name == "wandb":
        wandb = require("wandb", "wandb")
        run = wandb.init(dir=str(folder), name=folder.name, project="fastmim", resume="allow", id=folder.name)
        return lambda record: run.log(dict(_scalars(record)), step=record["step"])
    return lambda record: None


def _scalars(record: dict) -> list[tuple[str, float]]:
    return [(k, v) for k, v in record.items() if isinstance(v, (int, float)) and k != "step"]


class Display:
    """What the person at the terminal sees: one live line on a tty, plain lines elsewhere; rank 0 only."""

    def __init__(self, total: int, enabled: bool):
        self.total, self.enabled = total, enabled
        self.progress = None
        if enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            )
            self.progress.start()
            self.task = self.progress.add_task("", total=total)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            self.progress.console.print(text, highlight=False, markup=False) if self.progress else print(
                text, flush=True
            )

    def step(self, step: int) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step)

    def record(self, record: dict) -> None:
        text = describe(record)
        if self.progress:
            self.progress.update(self.task, completed=record["step"], description=text)
        elif self.enabled:
            left = (self.total - record["step"]) * record["step_ms"] / 1e3
            eta = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} days"
            print(f"step {record['step']}/{self.total}  {text}  eta {eta}", flush=True)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()


def describe(record: dict) -> str:
    parts = " ".join(f"{k.removeprefix('loss/')} {v:.4f}" for k, v in record.items() if k.startswith("loss/"))
    return (
        f"epoch {record['epoch']:.2f}  loss {record['loss']:.4f} ({parts})  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:.3f}  {record['images_per_s']:.0f} img/s  {record['step_ms']:.0f} ms  "
        f"data {100 * record['data_wait']:.0f}%  {record['peak_mib']:.0f} MiB"
    )
