"""How long a step takes and what processes send each other: formulas, with the sources of their constants.

    step = (micro-batches x compute + optimizer) / efficiency + communication that nothing hides, or the host's time if
           that is more; on a CPU, their sum
    compute = FLOPs / (0.80 x peak) + 5 x saved bytes / (0.90 x bandwidth), and a third of that again for what
              --checkpointing computes twice

Efficiency is 1 where products and memory run one after the other, each at its ceiling; `fastmim plan --measured` takes
it from measured steps.
"""

import math
from typing import NamedTuple

from fastmim.engine.base import state_bytes as engine_bytes
from fastmim.flops import peak_flops
from fastmim.memory import StepMemory
from fastmim.methods.base import Method

# Measured on one H200: products of 8192^3 in bf16 at 769 to 798 of 989 TFLOP/s, copies at 4.3 of 4.8 TB/s. Taken for
# the other GPUs and for fp32, too.
MATMUL_SHARE, COPY_SHARE = 0.80, 0.90
# Bytes moved per byte that the forward pass saves. Counted per token and block of width d, all fused: 164 d moved of
# which 32 d stay until the backward pass (reads of inputs, gradients in and out, recomputed epilogues).
TRAFFIC = 5.0
# The forward pass's share of that and of the products: what --checkpointing computes again costs as much once more.
FORWARD_SHARE = 1 / 3
# AdamW with fp32 weights: reads weight, gradient and two moments, writes three; the average of a target: two reads and a
# write.
OPTIMIZER_BYTES, AVERAGE_BYTES = 28, 12
# DeepSpeed keeps parameters below stage3_param_persistence_threshold on every rank.
PERSISTENT = 100_000
# NCCL's bus bandwidth as a share of the links' (own assumption), and what one collective takes at least, per doubling of
# the number of processes (own assumption: 21 us over 8 GPUs).
NETWORK_SHARE, COLLECTIVE_SECONDS = 0.8, 7e-6
# Between a GPU and its host, each way (PCIe 5.0 x16 has 64 GB/s, 4.0 half of that), and a GPU's share of the host's memory:
# own assumptions.
HOST_LINK, HOST_BANDWIDTH = 25e9, 50e9
# What DeepSpeed's hooks cost the host per parameter tensor and micro-batch, by stage. Measured with DeepSpeed 0.19.8 on a
# CPU (one process, 205 tiny tensors, so that nothing else takes time): 12.7, 14 and 50 ms per step over plain torch.
HOST_SECONDS = (0.0, 62e-6, 68e-6, 244e-6)
# What it takes a host to start an operation. On a CPU nothing else happens meanwhile: 8 us in fp32 and up to 16 under
# autocast, from steps of CAE at 48 pixels (one thread at 2.6 GHz, 2,500 operations); the lower is taken where it was not
# measured. Where a GPU computes, the host runs ahead.
OP_SECONDS = 8e-6
# The backward pass's share of a step's compute: two of three products.
BACKWARD_SHARE = 1 - FORWARD_SHARE
FP32 = 4
# torch's DistributedDataParallel (bucket_cap_mb) and DeepSpeed (zero_optimization.reduce_bucket_size, in
# elements; of a smaller model the engine makes it the whole gradient).
DDP_BUCKET, ZERO_BUCKET = 25 * 2**20, 500_000_000
# DeepSpeed keeps so many gathered parameters at most (zero_optimization.stage3_max_live_parameters).
LIVE_PARAMETERS = 1_000_000_000
STAGES = ("ddp", "zero 1", "zero 2", "zero 3")


def parts(stage: str) -> tuple[int, str]:
    """ZeRO's stage and what is on the host.

    Args:
        stage: one of `STAGES`, "single", or a stage of ZeRO and its offload: "zero 2 optimizer", "zero 3 all".
    """
    _, _, rest = stage.partition(" ")
    level, _, offload = rest.partition(" ")
    return int(level or 0), offload or "none"


class Machine(NamedTuple):
    """A GPU and its links. Source: NVIDIA's data sheets."""

    name: str
    flops: float
    """Dense bf16 products with fp32 accumulation, FLOP/s, as the data sheet has it."""
    fp32_flops: float
    """Products of fp32 numbers: those of the CUDA cores, as the trainer does not switch TF32 on."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    link: float
    """To the other GPUs of its node, bytes per second in one direction."""
    is_cpu: bool = False
    op_seconds: float = OP_SECONDS
    """What its host needs to start an operation."""

    def peak(self, *, low_precision: bool) -> float:
        return self.flops if low_precision else self.fp32_flops


def _gpu(name: str, fp32_tflops: float, memory_gb: float, bandwidth_tb: float, link_gb: float) -> Machine:
    return Machine(
        name, peak_flops(name), fp32_tflops * 1e12, memory_gb * 1e9, bandwidth_tb * 1e12, link_gb * 1e9
    )  # fmt: skip


# fp32: the lines "FP32" (not "TF32 Tensor Core") of NVIDIA's data sheets: HGX B200, H200 SXM, H100 SXM, A100, L40S;
# for the RTX 4090 the Ada architecture's white paper.
MACHINES = {
    "b200": _gpu("B200", 75, 180, 8.0, 900),
    "h200": _gpu("H200", 67, 141, 4.8, 450),
    "h100": _gpu("H100", 67, 80, 3.35, 450),
    "a100": _gpu("A100", 19.5, 80, 2.04, 300),
    "l40s": _gpu("L40S", 91.6, 48, 0.864, 32),
    "rtx4090": _gpu("RTX 4090", 82.6, 24, 1.008, 32),
}


def sheet_peak(name: str, *, low_precision: bool) -> float | None:
    """FLOP/s of the data sheet of a device, by the name that torch gives it; None if unknown."""
    bf16 = peak_flops(name)
    # An H200 NVL is no H200: its bf16 peak tells.
    known = (m.fp32_flops for m in MACHINES.values() if m.name in name and m.flops == bf16)
    return bf16 if low_precision else next(known, None)


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
    """Per image, forward and backward, and what is computed again."""
    saved: float
    """Bytes saved for the backward pass by a micro-batch, if nothing is computed again."""
    ops: int = 0
    """Operations of a micro-batch."""
    tensors: int = 0
    """Parameter tensors."""
    gathers: int = 0
    """Modules whose parameters ZeRO-3 gathers, each by itself."""
    low_precision: bool = True
    recomputed: float = 0.0
    """Bytes of `saved` that are not kept but computed again."""


def load_of(
    method: Method,
    flops: float,
    micro_batch: int,
    accumulate: int = 1,
    step: StepMemory | None = None,
    *,
    low_precision: bool = True,
) -> Load:
    """One process's work; the method may be on the meta device. Without a traced step, products alone take time."""
    trained = [p.numel() for p in method.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in method.parameters()) - sum(trained)
    own = (module.parameters(recurse=False) for module in method.modules())
    gathers = sum(any(p.numel() > PERSISTENT for p in parameters) for parameters in own)
    saved, ops = (step.saved, step.ops) if step else (0, 0)
    return Load(
        sum(trained), frozen, micro_batch, accumulate, flops, saved, ops, len(trained), gathers, low_precision
    )  # fmt: skip


# ---- communication


def traffic(stage: str, load: Load, gpus: int) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by purpose, with rings: a gather or a scatter of m bytes sends m (n - 1) / n.

    Source: ZeRO (arXiv 1910.02054 section 7), for fp32 gradients and parameters. ddp: gradients scattered and gathered.
    Stages 1 and 2: the same for gradients, as DeepSpeed's `use_multi_rank_bucket_allreduce` does it (1 x instead of 2 x
    without), then the parameters gathered; stage 2 does it for each micro-batch. Stage 3: parameters gathered for the
    forward and for the backward pass, frozen ones for the forward, gradients scattered, all for each micro-batch.
    """
    part = (gpus - 1) / gpus * FP32
    psi, k, (level, _) = part * load.trained, load.accumulate, parts(stage)
    if level == 0:
        return {"gradients": 2 * psi}
    if level == 1:
        return {"gradients": 2 * psi, "parameters": psi}
    if level == 2:
        return {"gradients": 2 * psi * k, "parameters": psi}
    return {"gradients": psi * k, "parameters": (2 * psi + part * load.frozen) * k}


def collectives(stage: str, load: Load) -> int:
    """Collectives of a step."""
    level, _ = parts(stage)
    if level == 0:
        return math.ceil(FP32 * load.trained / DDP_BUCKET)
    buckets = math.ceil(load.trained / ZERO_BUCKET)
    if level == 3:
        return load.accumulate * (2 * load.gathers + buckets)
    return buckets * (load.accumulate if level == 2 else 1) + 1


def host_bytes(stage: str, load: Load, gpus: int) -> float:
    """Bytes between a GPU and its host in a step: gradients of each micro-batch there and new weights back, or, where the
    parameters are there, too, these for the forward and for the backward pass of each, frozen ones for the forward.
    """
    _, offload = parts(stage)
    part, k = FP32 / gpus, load.accumulate
    if offload == "none":
        return 0.0
    return part * load.trained * (k + 1) if offload == "optimizer" else part * (3 * load.trained + load.frozen) * k


# ---- time


def compute_seconds(load: Load, machine: Machine) -> float:
    """Of one micro-batch, forward and backward, at the machine's ceilings; without what it takes to start operations."""
    products = load.micro_batch * load.flops / (MATMUL_SHARE * machine.peak(low_precision=load.low_precision))
    moved = TRAFFIC * (load.saved + FORWARD_SHARE * load.recomputed)
    return products + moved / (COPY_SHARE * machine.bandwidth)


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
    compute; stages 1 and 2 hide none (DeepSpeed's `overlap_comm` is off there by default), nor does what goes to a host.
    """
    level, offload = parts(stage)
    machine, gpus = cluster.machine, cluster.gpus
    one = compute_seconds(load, machine) / efficiency
    compute = one * load.accumulate
    optimizer = optimizer_seconds(load, machine, 1 / gpus if level else 1.0) / efficiency
    if offload != "none":
        averages = optimizer_seconds(load, machine, 0.0) / efficiency
        optimizer = averages + OPTIMIZER_BYTES * load.trained / gpus / HOST_BANDWIDTH
    communication = 0.0
    if gpus > 1:
        sent = sum(traffic(stage, load, gpus).values())
        communication = sent / cluster.bus() + collectives(stage, load) * COLLECTIVE_SECONDS * math.log2(gpus)
    hidden = {0: BACKWARD_SHARE * one, 3: compute}.get(level, 0.0)
    to_host = host_bytes(stage, load, gpus) / HOST_LINK
    exposed = max(0.0, communication - hidden) + to_host
    host = start_seconds(load, machine) + HOST_SECONDS[level] * load.tensors * load.accumulate
    return StepTime(compute, optimizer, communication + to_host, exposed, host, machine.is_cpu)


# ---- memory


def state_bytes(stage: str, load: Load, gpus: int) -> float:
    """Weights, AdamW's moments, targets, gradients where they have a place of their own, and DeepSpeed's buffers.

    Args:
        stage: see `parts`; "single": there gradients come and go with the activations, unless they wait for those of the
            next micro-batch.
    """
    level, offload = parts(stage)
    state = engine_bytes("zero" if level else stage, level, offload, gpus, load.trained, load.frozen)
    if stage == "single":
        return state - FP32 * load.trained * gradient_share(stage, load.accumulate)
    if level == 0:
        # DDP accumulates outside of its buckets: only a backward pass that averages moves gradients there (torch 2.13).
        return state + (FP32 * load.trained if load.accumulate > 1 else 0)
    if level == 3:
        state += FP32 * min(load.trained + load.frozen, LIVE_PARAMETERS)
    return state + FP32 * min(load.trained, ZERO_BUCKET)


def gradient_share(stage: str, accumulate: int) -> float:
    """Share of gradients that come up beside the activations; the rest is in `state_bytes`."""
    return 1.0 if stage == "single" and accumulate == 1 else 0.0
