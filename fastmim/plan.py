"""`fastmim plan`: what a run will need and how long it will take, before any GPU is rented."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch

from fastmim.config import ConfigError, TrainConfig, check_range, nearest
from fastmim.efficiency import measured
from fastmim.engine.base import choose
from fastmim.flops import TRAINED, Flops, training_flops
from fastmim.memory import Policy, micro_batches, trace_step
from fastmim.methods import base as methods
from fastmim.roofline import (
    MACHINES,
    MATMUL_SHARE,
    STAGES,
    Cluster,
    Load,
    StepTime,
    gradient_share,
    load_of,
    sheet_peak,
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
# What `Method.represent` runs of the terms of flops.py.
REPRESENTED = ("encoder", "feature decoder", "class blocks", "target encoder", "target class blocks")
# Above 1, as the published algorithm's operations count, of which our steps leave some out. Own choice.
MOST_EFFICIENCY = 1.5


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
    loads: dict[Policy, Load]
    flops: float
    """Per image, as published."""
    memory: dict[tuple[str, Policy], Memory]
    times: dict[tuple[str, Policy], StepTime]
    efficiency: float
    why_efficiency: str
    stage: str
    why_stage: str

    @property
    def load(self) -> Load:
        return self.loads[self.config.checkpointing]

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for stage, _ in self.times))

    def time(self, stage: str) -> StepTime:
        """Of a step as the run's options have it."""
        return self.times[stage, self.config.checkpointing]

    def images_per_s(self, stage: str) -> float:
        return self.config.batch_size / self.time(stage).total


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
    config.check_groups(cluster.gpus, method.batch_multiple)
    micro = config.batch_size // cluster.gpus // config.accumulate
    low = config.precision != "fp32"
    sizes = load_of(method, flops.training, micro, config.accumulate, low_precision=low)
    device_bytes = None if math.isinf(cluster.machine.memory) else round(cluster.machine.memory)
    choice = choose(
        config.engine, config.zero, cluster.gpus, sizes.trained, device_bytes, frozen=sizes.frozen,
        offload=config.zero_offload,
    )  # fmt: skip
    stages = STAGES if cluster.gpus > 1 else ("single",)
    stage = f"zero {choice.stage}" if choice.stage and cluster.gpus > 1 else stages[0]
    if choice.offload != "none":
        stage = f"zero {choice.stage} {choice.offload}"
        stages = (*stages, stage)
    # Gradients weigh on the peak only where they come and go.
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
        for share in {gradient_share(s, config.accumulate) for s in stages}
        for policy in POLICIES
    }
    joins = method.mixes_images and method.can_represent() and config.contrast_batch == "step" and config.accumulate > 1
    again = sum(t.forward for t in flops.terms if joins and t.name.partition(":")[0] in REPRESENTED)
    share = gradient_share(stages[0], config.accumulate)
    kept = steps[share, "none"]
    loads = {
        policy: sizes._replace(
            flops=flops.training + again + (in_blocks(flops) if policy == "blocks" else 0.0),
            saved=kept.saved,
            ops=steps[share, policy].ops,
            recomputed=kept.saved - steps[share, policy].saved,
        )
        for policy in POLICIES
    }
    memory = {
        (s, policy): Memory(
            state_bytes(s, sizes, cluster.gpus), steps[gradient_share(s, config.accumulate), policy].peak
        )
        for s in stages
        for policy in POLICIES
    }  # fmt: skip
    times = {(s, policy): step_time(s, loads[policy], cluster, efficiency) for s in stages for policy in POLICIES}
    return Plan(config, cluster, loads, flops.training, memory, times, efficiency, why, stage, choice.reason)


def in_blocks(flops: Flops) -> float:
    """What the forward pass of the blocks costs that are trained: `--checkpointing blocks` takes it twice.

    With the layers that lead into and out of a decoder, which are small.
    """
    return sum(t.forward for t in flops.terms if t.passes == TRAINED and "head" not in t.name and t.name != "contrast")


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
    parser.add_argument("--gpu", help=f"{', '.join(MACHINES)} (default: the machine of --measured, else h200)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of all nodes. (default: 1)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node. (default: 8)")
    parser.add_argument("--network", type=float, default=400, metavar="GBIT",
                        help="Gb/s between nodes per GPU. (default: 400)")  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=IMAGENET, metavar="N", help="Of the data set. (default: ImageNet's)"
    )
    parser.add_argument("--scale", action="store_true", help="Print docs/scale.md and stop.")
    parser.add_argument("--efficiency", type=float, metavar="SHARE",
                        help=f"Of the roofline, up to {MOST_EFFICIENCY:g}. (default: 1)")  # fmt: skip
    parser.add_argument("--measured", type=Path, metavar="FILE",
                        help="Take the efficiency, and on a CPU the ceilings, from results of `fastmim bench step`.")  # fmt: skip
    own, rest = parser.parse_known_args(argv)
    if own.scale:
        from fastmim.scale import document

        print(document(), end="")
        return
    for name, least in (("gpus", 1), ("per_node", 1), ("images", 1)):
        check_range(f"plan --{name.replace('_', '-')}", getattr(own, name), least)
    check_range("plan --network", own.network, 0, low_included=False)
    if own.efficiency is not None:
        check_range("plan --efficiency", own.efficiency, 0, MOST_EFFICIENCY, low_included=False)
    if own.gpu is not None and own.gpu not in MACHINES:
        raise ConfigError(
            f"--gpu: expected one of {', '.join(MACHINES)}, got {own.gpu}{nearest(own.gpu, list(MACHINES))}"
        )
    if not any(token.startswith(("--preset", "--data", "--config")) for token in rest):
        rest = ["--preset", "paper", *rest]
    config = parse_train(rest)
    machine, share, why = MACHINES[own.gpu or "h200"], 1.0, "an upper bound: nothing was measured (--measured FILE)"
    if own.measured is not None:
        found, share, why = measured(own.measured, config.method, "fp32" if config.precision == "fp32" else "bf16")
        machine = found if own.gpu is None else machine
    if own.efficiency is not None:
        share, why = own.efficiency, "given"
    if own.gpus > 1 and not machine.link:
        raise ConfigError(
            f"plan --gpus: expected 1, as the links of {machine.name} are not known, got {own.gpus}; give --gpu"
        )
    cluster = Cluster(machine, own.gpus, own.per_node, own.network * 1e9 / 8)
    plan = make_plan(config, cluster, share, why)
    print("\n".join(report(plan, own.images)))


def report(plan: Plan, images: int) -> list[str]:
    """The lines that the command prints."""
    c, load, cluster = plan.config, plan.load, plan.cluster
    machine, limit = cluster.machine, cluster.machine.memory * USABLE
    size = "x".join(str(s) for s in c.model_spec().image_size)
    kept = (load.saved - load.recomputed) / max(1, load.micro_batch)
    lines = [
        f"run          {c.method}, preset {c.preset}, {c.model}/{c.patch_size} at {size}, "
        f"{'fp32' if c.precision == 'fp32' else 'bf16'}, on {cluster.gpus} x {machine.name}",
        f"parameters   {load.trained / 1e6:.1f} M to train, {load.frozen / 1e6:.1f} M that follow",
        f"cost         {plan.flops / 1e9:.4g} GFLOP per image as published, forward and backward",
        f"batch        {c.batch_size} = {cluster.gpus} GPUs x {c.accumulate} micro-batches x {load.micro_batch} images; "
        f"{kept / 2**20:.1f} MiB saved per image",
        "",
        f"{'GiB of one GPU':18}" + "".join(f"{'checkpointing ' + p:>24}" for p in POLICIES),
    ]
    for stage in plan.stages:
        cells = [plan.memory[stage, policy] for policy in POLICIES]
        lines.append(f"  {stage:16}" + "".join(
            f"{f'{m.total / GIB:.1f} = {m.state / GIB:.1f} + {m.step / GIB:.1f}':>19}{' fits' if m.total < limit else '  -  '}"
            for m in cells
        ))  # fmt: skip
    lines += ["  state + one micro-batch, and 1 GiB for CUDA", ""]
    lines += [*speeds(plan), ""]
    steps = c.total_steps(max(1, images // c.batch_size))

    def hours(stage: str, policy: Policy) -> str:
        return f"{steps * plan.times[stage, policy].total / 3600:.1f} h"

    lines += [
        f"engine       {plan.stage}: {plan.why_stage}",
        f"time         {hours(plan.stage, c.checkpointing)} for {steps} steps: "
        f"{c.epochs or steps * c.batch_size / images:g} epochs of {images} images",
    ]
    fits = [key for key, memory in plan.memory.items() if memory.total < limit]
    if (plan.stage, c.checkpointing) not in fits:
        advice = "more GPUs or a larger --accumulate"
        if fits:
            stage, policy = min(fits, key=lambda key: key[0] != plan.stage)
            step = 1e3 * plan.times[stage, policy].total
            advice = f"{stage}, checkpointing {policy} ({step:.0f} ms a step, {hours(stage, policy)})"
        lines.append(f"warning      {plan.stage}, checkpointing {c.checkpointing} does not fit; what does: {advice}")
    return lines


def speeds(plan: Plan) -> list[str]:
    """The table of times, and what its shares are of."""
    c, load, cluster = plan.config, plan.load, plan.cluster
    peak = cluster.machine.peak(low_precision=load.low_precision)
    sheet, products = sheet_peak(cluster.machine.name, low_precision=load.low_precision), MATMUL_SHARE * peak
    lines = [
        f"{'one step':18}{'sent per GPU':>14}{'step':>10}{'exposed':>10}{'images/s':>11}{'of sheet':>10}{'of products':>13}"
    ]
    for stage in plan.stages:
        time, speed = plan.time(stage), plan.images_per_s(stage)
        sent = sum(traffic(stage, load, cluster.gpus).values()) if cluster.gpus > 1 else 0.0
        done = speed * plan.flops / cluster.gpus
        lines.append(
            f"  {stage:16}{f'{sent / 1e9:.2f} GB':>14}{f'{1e3 * time.total:.0f} ms':>10}{f'{1e3 * time.exposed:.0f} ms':>10}"
            f"{speed:>11.0f}{f'{100 * done / sheet:.0f} %' if sheet else '-':>10}{f'{100 * done / products:.0f} %':>13}"
        )
    is_assumed = cluster.machine in MACHINES.values()
    ceiling = f"{100 * MATMUL_SHARE:.0f} % of that, assumed" if is_assumed else "measured"
    of_sheet = f"the data sheet's {sheet / 1e12:.4g} TFLOP/s" if sheet else "a data sheet that is not known"
    return [
        *lines,
        f"  with checkpointing {c.checkpointing}; MFU as a share of {of_sheet}, and of large products: "
        f"{products / 1e12:.4g} TFLOP/s, {ceiling}",
        f"  efficiency {plan.efficiency:.2f} of the roofline: {plan.why_efficiency}",
    ]
