"""How long a step takes and what processes send each other: formulas, with the sources of their constants.

    step = (micro-batches x compute + optimizer) / efficiency + communication that nothing hides, or the host's time if
           that is more; on a CPU, their sum
    compute = FLOPs / (0.80 x peak) + 5 x saved bytes / (0.90 x bandwidth)

Efficiency is 1 where products and memory run one after the other, each at its ceiling; `fastmim plan --measured` takes
it from measured steps.
"""

import math
from typing import NamedTuple

from fastmim.engine.base import state_bytes as engine_bytes
from fastmim.flops import peak_flops

# Measured on one H200: products of 8192^3 in bf16 at 769 to 798 of 989 TFLOP/s, copies at 4.3 of 4.8 TB/s. Taken for
# the other GPUs, too.
MATMUL_SHARE, COPY_SHARE = 0.80, 0.90
# Bytes moved per byte that the forward pass saves. Counted per token and block of width d, all fused: 164 d moved of
# which 32 d stay until the backward pass (reads of inputs, gradients in and out, recomputed epilogues).
TRAFFIC = 5.0
# AdamW with fp32 weights: reads weight, gradient and two moments, writes three; the average of a target: two reads and a
# write.
OPTIMIZER_BYTES, AVERAGE_BYTES = 28, 12
# NCCL's bus bandwidth as a share of the links' (own assumption), and what one collective takes at least, per doubling of
# the number of processes (own assumption: 21 us over 8 GPUs).
NETWORK_SHARE, COLLECTIVE_SECONDS = 0.8, 7e-6
# What DeepSpeed's hooks cost the host per parameter tensor and micro-batch. Measured with DeepSpeed 0.19.8 on a CPU (one
# process, 205 tiny tensors, so that nothing else takes time): 12.7, 14 and 50 ms per step over plain torch.
HOST_SECONDS = {"ddp": 0.0, "zero 1": 62e-6, "zero 2": 68e-6, "zero 3": 244e-6}
# What it takes a host to start an operation. On a CPU nothing else happens meanwhile: 8 us in fp32 and up to 16 under
# autocast, from steps of CAE at 48 pixels (one thread at 2.6 GHz, 2,500 operations); the lower is taken where it was not
# measured. Where a GPU computes, the host runs ahead.
OP_SECONDS = 8e-6
# The backward pass's share of a step's compute: two of three products.
BACKWARD_SHARE = 2 / 3
FP32 = 4
# torch's DistributedDataParallel (bucket_cap_mb) and DeepSpeed (zero_optimization.reduce_bucket_size, in
# elements; of a smaller model the engine makes it the whole gradient).
DDP_BUCKET, ZERO_BUCKET = 25 * 2**20, 500_000_000
# DeepSpeed keeps so many gathered parameters at most (zero_optimization.stage3_max_live_parameters).
LIVE_PARAMETERS = 1_000_000_000
STAGES = ("ddp", "zero 1", "zero 2", "zero 3")


class Machine(NamedTuple):
    """A GPU and its links. Source: NVIDIA's data sheets."""

    name: str
    flops: float
    """Dense bf16 products with fp32 accumulation, FLOP/s, as the data sheet has it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    link: float
    """To the other GPUs of its node, bytes per second in one direction."""
    is_cpu: bool = False
    op_seconds: float = OP_SECONDS
    """What its host needs to start an operation."""


def _gpu(name: str, memory_gb: float, bandwidth_tb: float, link_gb: float) -> Machine:
    return Machine(name, peak_flops(name), memory_gb * 1e9, bandwidth_tb * 1e12, link_gb * 1e9)


MACHINES = {
    "b200": _gpu("B200", 180, 8.0, 900),
    "h200": _gpu("H200", 141, 4.8, 450),
    "h100": _gpu("H100", 80, 3.35, 450),
    "a100": _gpu("A100", 80, 2.04, 300),
    "l40s": _gpu("L40S", 48, 0.864, 32),
    "rtx4090": _gpu("RTX 4090", 24, 1.008, 32),
}


class Cluster(NamedTuple):
    machine: Machine
    gpus: int
    per_node: int = 8
    nic: float = 50e9
    """Bytes per second that a GPU's share of its node's network cards sends: 400 Gb/s."""

    def bus(self) -> float:
        """Bytes per second of a ring over all GPUs, per GPU."""
        if self.gpus <= self.per_node:
            return NETWORK_SHARE * self.machine.link
        # Each of `per_node` parallel rings leaves a node through a card of its own, so that a GPU's data leave the node
        # with the bandwidth of all its cards; inside it, the links bound.
        return NETWORK_SHARE * min(self.machine.link, self.per_node * self.nic)


class Load(NamedTuple):
    """One process's work in a step."""

    trained: int
    """Parameters."""
    frozen: int
    micro_batch: int
    accumulate: int
    flops: float
    """Per image, forward and backward."""
    saved: float
    """Bytes saved for the backward pass by a micro-batch."""
    ops: int = 0
    """Operations of a micro-batch."""
    tensors: int = 0
    """Parameter tensors."""
    gathers: int = 0
    """Modules whose parameters ZeRO-3 gathers, each by itself."""


# ---- communication


def traffic(stage: str, load: Load, gpus: int) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by purpose, with rings: a gather or a scatter of m bytes sends m (n - 1) / n.

    Source: ZeRO (arXiv 1910.02054 section 7), for fp32 gradients and parameters. ddp: gradients scattered and gathered.
    Stages 1 and 2: the same for gradients, as DeepSpeed's `use_multi_rank_bucket_allreduce` does it (1 x instead of 2 x
    without), then the parameters gathered; stage 2 does it for each micro-batch. Stage 3: parameters gathered for the
    forward and for the backward pass, frozen ones for the forward, gradients scattered, all for each micro-batch.
    """
    part = (gpus - 1) / gpus * FP32
    psi, k = part * load.trained, load.accumulate
    if stage == "ddp":
        return {"gradients": 2 * psi}
    if stage == "zero 1":
        return {"gradients": 2 * psi, "parameters": psi}
    if stage == "zero 2":
        return {"gradients": 2 * psi * k, "parameters": psi}
    return {"gradients": psi * k, "parameters": (2 * psi + part * load.frozen) * k}


def collectives(stage: str, load: Load) -> int:
    """Collectives of a step."""
    gradients = FP32 * load.trained
    if stage == "ddp":
        return math.ceil(gradients / DDP_BUCKET)
    buckets = math.ceil(load.trained / ZERO_BUCKET)
    if stage == "zero 3":
        return load.accumulate * (2 * load.gathers + buckets)
    return buckets * (load.accumulate if stage == "zero 2" else 1) + 1


# ---- time


def compute_seconds(load: Load, machine: Machine) -> float:
    """Of one micro-batch, forward and backward, at the machine's ceilings; without what it takes to start operations."""
    products = load.micro_batch * load.flops / (MATMUL_SHARE * machine.flops)
    return products + TRAFFIC * load.saved / (COPY_SHARE * machine.bandwidth)


def optimizer_seconds(load: Load, machine: Machine, share: float = 1.0) -> float:
    """AdamW on a share of the parameters, and the averages of the targets."""
    moved = OPTIMIZER_BYTES * load.trained * share + AVERAGE_BYTES * load.frozen
    return moved / (COPY_SHARE * machine.bandwidth)


def start_seconds(load: Load, machine: Machine) -> float:
    """What the host needs to start a step's operations."""
    return load.accumulate * load.ops * machine.op_seconds


class StepTime(NamedTuple):
    """Seconds."""

    compute: float
    optimizer: float
    communication: float
    exposed: float
    """Communication that computing does not hide."""
    host: float
    """Starting operations, and DeepSpeed's hooks; a GPU computes meanwhile, a CPU cannot."""
    is_cpu: bool = False

    @property
    def total(self) -> float:
        device = self.compute + self.optimizer + self.exposed
        return device + self.host if self.is_cpu else max(device, self.host)


def step_time(stage: str, load: Load, cluster: Cluster, efficiency: float = 1.0) -> StepTime:
    """Time of one step. ddp hides its communication behind the last micro-batch's backward pass, ZeRO-3 behind all
    compute; stages 1 and 2 hide none (DeepSpeed's `overlap_comm` is off there by default).
    """
    one = compute_seconds(load, cluster.machine) / efficiency
    compute = one * load.accumulate
    sharded = stage != "ddp"
    optimizer = optimizer_seconds(load, cluster.machine, 1 / cluster.gpus if sharded else 1.0) / efficiency
    host = start_seconds(load, cluster.machine)
    if cluster.gpus == 1:
        return StepTime(compute, optimizer, 0.0, 0.0, host, cluster.machine.is_cpu)
    sent = sum(traffic(stage, load, cluster.gpus).values())
    latency = collectives(stage, load) * COLLECTIVE_SECONDS * math.log2(cluster.gpus)
    communication = sent / cluster.bus() + latency
    hidden = {"ddp": BACKWARD_SHARE * one, "zero 3": compute}.get(stage, 0.0)
    host += HOST_SECONDS[stage] * load.tensors * load.accumulate
    return StepTime(
        compute, optimizer, communication, max(0.0, communication - hidden), host, cluster.machine.is_cpu
    )  # fmt: skip


# ---- memory


def state_bytes(stage: str, load: Load, gpus: int) -> float:
    """Weights, AdamW's moments, targets, gradients where they have a place of their own, and DeepSpeed's buffers.

    Args:
        stage: one of `STAGES`, or "single": there gradients come and go with the activations.
    """
    level = int(stage[-1]) if stage in STAGES[1:] else 0
    state = engine_bytes("zero" if level else stage, level, "none", gpus, load.trained, load.frozen)
    if stage == "single":
        return state - FP32 * load.trained
    if level == 3:
        state += FP32 * min(load.trained + load.frozen, LIVE_PARAMETERS)
    return state + (FP32 * min(load.trained, ZERO_BUCKET) if level else 0)


def gradient_share(stage: str) -> float:
    """Share of gradients that accumulate beside the activations; the rest is in `state_bytes`."""
    return 1.0 if stage == "single" else 0.0
