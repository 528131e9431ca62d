"""`fastmim plan`: what a run will need and how long it will take, before any GPU is rented."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import geometric_mean, median
from typing import NamedTuple

import torch

from fastmim.bench import config_of
from fastmim.config import ConfigError, TrainConfig, nearest
from fastmim.engine.base import choose
from fastmim.flops import training_flops
from fastmim.memory import Policy, StepMemory, micro_batches, trace_step
from fastmim.methods import base as methods
from fastmim.roofline import (
    COPY_SHARE,
    MACHINES,
    MATMUL_SHARE,
    STAGES,
    Cluster,
    Load,
    Machine,
    StepTime,
    compute_seconds,
    gradient_share,
    optimizer_seconds,
    state_bytes,
    step_time,
    traffic,
)

GIB = 2**30
IMAGENET = 1_281_167
POLICIES: tuple[Policy, ...] = ("none", "mlp", "blocks")
# What CUDA, cuBLAS and NCCL take beside the tensors, and the share of memory that the caching allocator cannot use: own
# assumptions.
CONTEXT_BYTES, USABLE = 1.0 * GIB, 0.94
# DeepSpeed keeps parameters below stage3_param_persistence_threshold on every rank.
PERSISTENT = 100_000
# What `Method.represent` runs of the terms of flops.py.
REPRESENTED = ("encoder", "feature decoder", "class blocks", "target encoder", "target class blocks")


class Memory(NamedTuple):
    """Bytes of one GPU."""

    state: float
    step: float

    @property
    def total(self) -> float:
        return self.state + self.step + CONTEXT_BYTES


@dataclasses.dataclass(frozen=True)
class Plan:
    config: TrainConfig
    cluster: Cluster
    load: Load
    flops: float
    """Per image, as published."""
    memory: dict[tuple[str, Policy], Memory]
    times: dict[str, StepTime]
    efficiency: float
    why_efficiency: str
    stage: str
    why_stage: str

    def images_per_s(self, stage: str) -> float:
        return self.config.batch_size / self.times[stage].total


def make_plan(config: TrainConfig, cluster: Cluster, efficiency: float = 1.0, why: str = "the roofline itself") -> Plan:
    """Everything that `fastmim plan` prints.

    Raises:
        ConfigError: options that contradict each other, or a method without a FLOP formula.
    """
    config.check(cluster.gpus)
    model = config.model_spec()
    with torch.device("meta"):
        method = methods.build(config.method, model, config.options, config.seed)
    device = torch.device("cpu" if cluster.machine.is_cpu else "cuda")
    if config.accumulate is None:
        # As the trainer cuts it.
        exact = dataclasses.replace(config, precision="fp32" if config.precision == "fp32" else "bf16")
        config = dataclasses.replace(config, accumulate=micro_batches(exact, method, cluster.gpus, device))
    formula = getattr(methods.find(config.method), "flops", None)
    flops = training_flops(config.method, model, config.options, formula)
    if flops is None:
        raise ConfigError(f"plan: expected {config.method} to have a FLOP formula; define `flops` in its file")
    micro = config.batch_size // cluster.gpus // config.accumulate
    low = config.precision != "fp32"
    # Gradients weigh on the peak only where they come and go: one trace with them, one without, per policy.
    steps = {
        (share, policy): trace_step(
            config.method,
            model,
            config.options,
            micro,
            low_precision=low,
            gradient_share=share,
            policy=policy,
            device=device.type,
        )
        for share in (0.0, 1.0)
        for policy in POLICIES
    }
    joins = method.mixes_images and method.can_represent() and config.contrast_batch == "step" and config.accumulate > 1
    again = sum(t.forward for t in flops.terms if joins and t.name.partition(":")[0] in REPRESENTED)
    load = load_of(method, flops.training + again, micro, config.accumulate, steps[1.0, "none"])
    stages = STAGES if cluster.gpus > 1 else ("single",)
    memory = {
        (stage, policy): Memory(
            state_bytes(stage, load, cluster.gpus), steps[gradient_share(stage), policy].peak
        )
        for stage in stages
        for policy in POLICIES
    }  # fmt: skip
    times = {s: step_time("ddp" if s == "single" else s, load, cluster, efficiency) for s in stages}
    device_bytes = None if math.isinf(cluster.machine.memory) else round(cluster.machine.memory)
    choice = choose(
        config.engine, config.zero, cluster.gpus, load.trained, device_bytes, frozen=load.frozen,
        offload=config.zero_offload,
    )  # fmt: skip
    stage = f"zero {choice.stage}" if choice.stage and cluster.gpus > 1 else stages[0]
    return Plan(config, cluster, load, flops.training, memory, times, efficiency, why, stage, choice.reason)


def load_of(
    method: methods.Method, flops: float, micro_batch: int, accumulate: int = 1, step: StepMemory | None = None
) -> Load:
    """One process's work; the method may be on the meta device. Without a traced step, products alone take time."""
    trained = [p.numel() for p in method.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in method.parameters()) - sum(trained)
    own = (module.parameters(recurse=False) for module in method.modules())
    gathers = sum(any(p.numel() > PERSISTENT for p in parameters) for parameters in own)
    saved, ops = (step.saved, step.ops) if step else (0, 0)
    return Load(sum(trained), frozen, micro_batch, accumulate, flops, saved, ops, len(trained), gathers)


# ---- efficiency from measurements


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
    product = max(r["matmul_tflops" if precision == "bf16" else "matmul_fp32_tflops"] for r in ceilings)
    copy = max(r["copy_gb_s"] for r in ceilings)
    machine = Machine(
        ours[0]["device"], product * 1e12 / MATMUL_SHARE, known.memory if known else math.inf, copy * 1e9 / COPY_SHARE,
        known.link if known else 0.0, is_cpu=ours[0]["device_type"] == "cpu",
    )  # fmt: skip
    fits = [fit(r, machine) for r in ours]
    machine = machine._replace(op_seconds=median(f.op_seconds for f in fits))
    return machine, geometric_mean(f.efficiency for f in fits), f"measured: {len(ours)} points of {path}"


class Fit(NamedTuple):
    """What a measured step says of a machine."""

    efficiency: float
    """Time at the machine's ceilings, as a share of what computing took."""
    op_seconds: float
    """What it took to start an operation."""


def fit(record: dict, machine: Machine) -> Fit:
    """Of a point of `fastmim bench step`.

    On a CPU it has the time of a second batch, too (`other_batch`, `other_ms`): what does not grow with the batch tells how
    long it takes to start operations. Without it, or where noise hides it, that is what `machine` says.
    """
    device = "cpu" if machine.is_cpu else "cuda"
    load = alone(config_of(record), record.get("micro_batches", 1), device)
    seconds, limit, starts = record["ms"] / 1e3, seconds_at_ceilings(load, machine), load.accumulate * load.ops
    if "other_ms" in record:
        load = alone(config_of(record | {"batch_size": record["other_batch"]}), record["other_micro_batches"], device)
        other, other_limit, other_starts = (
            record["other_ms"] / 1e3,
            seconds_at_ceilings(load, machine),
            load.accumulate * load.ops,
        )
        # Two equations: seconds = limit / efficiency + starts x op_seconds, for either batch.
        determinant = limit * other_starts - other_limit * starts
        inverse = (seconds * other_starts - other * starts) / determinant
        op_seconds = (limit * other - other_limit * seconds) / determinant
        if inverse > 0 and op_seconds >= 0:
            return Fit(1 / inverse, op_seconds)
    started = starts * machine.op_seconds if machine.is_cpu else 0.0
    # Where starting operations is most of a step, a point says little about the rest.
    return Fit(limit / max(seconds - started, seconds / 2), machine.op_seconds)


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
    return load_of(method, flops.training, size, micro_batches, step)


# ---- the command


def plan_command(argv: list[str]) -> None:
    """Parses the command's own flags; the others are those of `fastmim train`."""
    import argparse

    from fastmim.arguments import parse_train

    parser = argparse.ArgumentParser(
        prog="fastmim plan",
        description="Compute parameters, memory, speed, communication and hours of a run, before it runs.",
        epilog="All other flags are those of `fastmim train`: --method, --model, --batch-size, --accumulate, --zero ...; "
        "the preset is `paper` unless another is given.",
    )
    parser.add_argument("--gpu", default="h200", help=f"{', '.join(MACHINES)} (default: h200)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of all nodes. (default: 1)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node. (default: 8)")
    parser.add_argument("--network", type=float, default=400, metavar="GBIT",
                        help="Gb/s between nodes per GPU. (default: 400)")  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=IMAGENET, metavar="N", help="Of the data set. (default: ImageNet's)"
    )
    parser.add_argument("--scale", action="store_true", help="Print docs/scale.md and stop.")
    parser.add_argument("--efficiency", type=float, metavar="SHARE", help="Of the roofline. (default: 1)")
    parser.add_argument("--measured", type=Path, metavar="FILE",
                        help="Take the efficiency, and on a CPU the ceilings, from results of `fastmim bench step`.")  # fmt: skip
    own, rest = parser.parse_known_args(argv)
    if own.scale:
        from fastmim.scale import document

        print(document(), end="")
        return
    if own.gpu not in MACHINES:
        raise ConfigError(
            f"--gpu: expected one of {', '.join(MACHINES)}, got {own.gpu}{nearest(own.gpu, list(MACHINES))}"
        )
    if not any(token.startswith(("--preset", "--data", "--config")) for token in rest):
        rest = ["--preset", "paper", *rest]
    config = parse_train(rest)
    machine, share, why = MACHINES[own.gpu], 1.0, "an upper bound: nothing was measured (--measured FILE)"
    if own.measured is not None:
        found, share, why = measured(own.measured, config.method, "fp32" if config.precision == "fp32" else "bf16")
        machine = found if "--gpu" not in " ".join(argv) else machine
    if own.efficiency is not None:
        share, why = own.efficiency, "given"
    cluster = Cluster(machine, own.gpus, own.per_node, own.network * 1e9 / 8)
    plan = make_plan(config, cluster, share, why)
    print("\n".join(report(plan, own.images)))


def report(plan: Plan, images: int) -> list[str]:
    """The lines that the command prints."""
    c, load, cluster = plan.config, plan.load, plan.cluster
    machine, limit = cluster.machine, cluster.machine.memory * USABLE
    size = "x".join(str(s) for s in c.model_spec().image_size)
    lines = [
        f"run          {c.method}, preset {c.preset}, {c.model}/{c.patch_size} at {size}, "
        f"{'fp32' if c.precision == 'fp32' else 'bf16'}, on {cluster.gpus} x {machine.name}",
        f"parameters   {load.trained / 1e6:.1f} M to train, {load.frozen / 1e6:.1f} M that follow",
        f"cost         {plan.flops / 1e9:.4g} GFLOP per image as published, forward and backward",
        f"batch        {c.batch_size} = {cluster.gpus} GPUs x {c.accumulate} micro-batches x {load.micro_batch} images; "
        f"{load.saved / max(1, load.micro_batch) / 2**20:.1f} MiB saved per image",
        "",
        f"{'GiB of one GPU':14}" + "".join(f"{'checkpointing ' + p:>24}" for p in POLICIES),
    ]
    for stage in plan.times:
        cells = [plan.memory[stage, policy] for policy in POLICIES]
        lines.append(f"  {stage:12}" + "".join(
            f"{f'{m.total / GIB:.1f} = {m.state / GIB:.1f} + {m.step / GIB:.1f}':>19}{' fits' if m.total < limit else '  -  '}"
            for m in cells
        ))  # fmt: skip
    lines += ["  state + one micro-batch, and 1 GiB for CUDA", ""]
    lines.append(f"{'one step':14}{'sent per GPU':>14}{'step':>10}{'exposed':>10}{'images/s':>11}{'MFU':>7}")
    for stage, time in plan.times.items():
        sent = sum(traffic(stage, load, cluster.gpus).values()) if cluster.gpus > 1 else 0.0
        speed = plan.images_per_s(stage)
        mfu = speed * plan.flops / (cluster.gpus * machine.flops)
        lines.append(
            f"  {stage:12}{f'{sent / 1e9:.2f} GB':>14}{f'{1e3 * time.total:.0f} ms':>10}{f'{1e3 * time.exposed:.0f} ms':>10}"
            f"{speed:>11.0f}{f'{100 * mfu:.0f} %':>7}"
        )
    lines += [f"  efficiency {plan.efficiency:.2f} of the roofline: {plan.why_efficiency}", ""]
    steps = c.total_steps(max(1, images // c.batch_size))
    hours = steps * plan.times[plan.stage].total / 3600
    lines += [
        f"engine       {plan.stage}: {plan.why_stage}",
        f"time         {hours:.1f} h for {steps} steps: {c.epochs or steps * c.batch_size / images:g} epochs of {images} images",
    ]
    fits = [key for key, memory in plan.memory.items() if memory.total < limit]
    if (plan.stage, "none") not in fits:
        advice = f"{fits[0][0]}, checkpointing {fits[0][1]}" if fits else "more GPUs or a larger --accumulate"
        lines.append(f"warning      {plan.stage} without checkpointing does not fit; what does: {advice}")
    return lines
