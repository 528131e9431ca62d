"""How close to a machine's ceilings steps come, from results of `fastmim bench step`: what `fastmim plan --measured` takes."""

import json
import math
from pathlib import Path
from statistics import geometric_mean, median
from typing import NamedTuple

import torch

from fastmim.bench import config_of
from fastmim.config import ConfigError, TrainConfig
from fastmim.flops import training_flops
from fastmim.memory import trace_step
from fastmim.methods import base as methods
from fastmim.roofline import (
    COPY_SHARE,
    MACHINES,
    MATMUL_SHARE,
    Load,
    Machine,
    compute_seconds,
    load_of,
    optimizer_seconds,
)

# A CPU's ceiling is that of torch's products. Without matrix tiles ours are faster, up to 1.15 times (bench/NOTES.md).
MOST_OF_CEILING = 1.2


def measured(path: Path, method: str, precision: str) -> tuple[Machine, float, str]:
    """The machine of a results file of `fastmim bench step`, and the efficiency of our steps on it.

    Points of the same method are taken if there are any, else those of all.

    Raises:
        ConfigError: nothing measured in it.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise ConfigError(f"--measured: cannot read {path}: {e}") from e
    ours = [r for r in records if r.get("suite") == "step" and r["provider"] == "ours" and r["precision"] == precision]
    ours = [r for r in ours if r["method"] == method] or ours
    ceilings = [r for r in records if r.get("suite") == "ceiling"]
    if not ours or not ceilings:
        raise ConfigError(
            f"--measured: expected {precision} steps of ours, found none; run `fastmim bench step --json {path}`"
        )
    known = next((m for m in MACHINES.values() if m.name in ours[0]["device"]), None)
    product, product32, copy = (
        max(r[key] for r in ceilings) for key in ("matmul_tflops", "matmul_fp32_tflops", "copy_gb_s")
    )
    machine = Machine(
        ours[0]["device"], product * 1e12 / MATMUL_SHARE, product32 * 1e12 / MATMUL_SHARE,
        known.memory if known else math.inf, copy * 1e9 / COPY_SHARE, known.link if known else 0.0,
        is_cpu=ours[0]["device_type"] == "cpu",
    )  # fmt: skip
    fits = [fit(r, machine) for r in ours]
    machine = machine._replace(op_seconds=median(f.op_seconds for f in fits))
    # Each by the machine's figure for operations, not by its own: the two belong together.
    return machine, geometric_mean(f.efficiency(machine) for f in fits), f"measured: {len(ours)} points of {path}"


class Fit(NamedTuple):
    """What a measured step says of a machine."""

    seconds: float
    limit: float
    """Seconds at the machine's ceilings."""
    starts: int
    """Operations."""
    op_seconds: float
    """What it took to start one."""
    least: float
    """Seconds that computing took at least."""

    def efficiency(self, machine: Machine) -> float:
        """Time at the machine's ceilings, as a share of what computing took."""
        started = self.starts * machine.op_seconds if machine.is_cpu else 0.0
        return self.limit / max(self.seconds - started, self.least)


def fit(record: dict, machine: Machine) -> Fit:
    """Of a point of `fastmim bench step`.

    On a CPU it has the time of a second batch, too (`other_batch`, `other_ms`): what does not grow with the batch tells how
    long it takes to start operations. Without it, or where noise hides it (a figure below zero, or computing that is
    faster than it can be), that is what `machine` says.
    """
    device = "cpu" if machine.is_cpu else "cuda"
    load = alone(config_of(record), record.get("micro_batches", 1), device)
    seconds, limit, starts = record["ms"] / 1e3, seconds_at_ceilings(load, machine), load.accumulate * load.ops
    # Where starting operations is most of a step, one batch says little about the rest.
    op_seconds, least = machine.op_seconds, seconds / 2
    # Micro-batches of one size, more or fewer, take the same per operation: but for the optimizer, one equation twice.
    if "other_ms" in record and record["other_batch"] != load.micro_batch * record["other_micro_batches"]:
        second = alone(config_of(record | {"batch_size": record["other_batch"]}), record["other_micro_batches"], device)
        other, other_limit = record["other_ms"] / 1e3, seconds_at_ceilings(second, machine)
        other_starts = second.accumulate * second.ops
        # Two equations: seconds = limit / efficiency + starts x op_seconds, for either batch.
        determinant = limit * other_starts - other_limit * starts
        inverse = (seconds * other_starts - other * starts) / determinant
        found = (limit * other - other_limit * seconds) / determinant
        if inverse >= 1 / MOST_OF_CEILING and found >= 0:
            op_seconds, least = found, min(least, limit * inverse)
    return Fit(seconds, limit, starts, op_seconds, least)


def seconds_at_ceilings(load: Load, machine: Machine) -> float:
    """Of a step, without what it takes to start operations."""
    return load.accumulate * compute_seconds(load, machine) + optimizer_seconds(load, machine)


def alone(config: TrainConfig, micro_batches: int = 1, device: str = "cpu") -> Load:
    """The work of one process that takes the whole batch, in so many parts, on a type of device."""
    model, size = config.model_spec(), config.batch_size // micro_batches
    low = config.precision != "fp32"
    step = trace_step(config.method, model, config.options, size, low_precision=low, device=device)
    with torch.device("meta"):
        method = methods.build(config.method, model, config.options, 0)
    formula = getattr(methods.find(config.method), "flops", None)
    flops = training_flops(config.method, model, config.options, formula)
    return load_of(method, flops.training, size, micro_batches, step, low_precision=low)
