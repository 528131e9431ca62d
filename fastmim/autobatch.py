"""`--batch-size auto`: the largest batch whose step fits into the memory of a device."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from fastmim_pipelines.spec import Batch

from fastmim import dist, float8
from fastmim.config import ConfigError, ModelSpec, TrainConfig
from fastmim.device import memory_bytes
from fastmim.engine import base as engines
from fastmim.engine.single import SingleEngine
from fastmim.memory import trace_step
from fastmim.methods import base as methods
from fastmim.recompute import set_checkpointing
from fastmim.step import StepProgram

# Images per device come in multiples of this, as products in bf16 do on GPUs (NVIDIA's guide to matrix multiplication).
UNIT = 8
# Share of a device's memory that a step may take: evaluation, other processes and fragments need some, too. Own choice.
SHARE = 0.9
# No batch is larger than this without a data set to bound it: torch's attention for GPUs has a launch dimension of at most
# 65,535 for the batch (pytorch issues 142228, 146704).
MOST_IMAGES = (1 << 16) - UNIT


class Found(NamedTuple):
    images: int
    """Of one device and micro-batch."""
    how: str


def largest(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that fits, by doubling and bisection; 0 if none does.

    Args:
        fits: true up to some number of images, false from there on.
    """
    good, bad, step = 0, most // unit + 1, 1
    while good + step < bad:
        if fits((good + step) * unit):
            good, step = good + step, 2 * step
        else:
            bad = good + step
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit


def find_batch(
    config: TrainConfig, model: ModelSpec, device: torch.device, choice: engines.Choice, multiple: int, most: int
) -> Found:
    """The largest micro-batch of this process's device.

    Real steps are taken on a GPU with the engines that keep a whole copy of the state; else the memory is computed.

    Args:
        config: with a precision; its batch size is not looked at.
        model: sizes.
        device, choice: of the run.
        multiple: of which the images of a micro-batch must be one.
        most: images.
    """
    is_tried = device.type == "cuda" and choice.engine != "zero"
    trial = _tried(config, model, device) if is_tried else _computed(config, model, device, choice)
    with trial as (fits, how):
        images = 0
        for unit in (math.lcm(UNIT, multiple), multiple):
            images = images or largest(fits, unit, most)
    return Found(images, how)


@contextmanager
def _tried(config: TrainConfig, model: ModelSpec, device: torch.device) -> Iterator[tuple[Callable[[int], bool], str]]:
    """By taking steps. The method is built anew for the run: what is done to this one does not matter."""
    method = methods.build(config.method, model, config.options, config.seed)
    set_checkpointing(method, config.checkpointing)
    float8.convert(method, config.fp8)
    spec = engines.EngineSpec(
        device=device, precision=config.precision, accumulate=1, micro_batch=1, lr=0.0, weight_decay=0.0,
        betas=config.betas, clip=config.clip, zero_stage=0,
    )  # fmt: skip
    engine = SingleEngine(method, spec)
    program = StepProgram(method, engine, 1, "micro")
    rng = torch.zeros(2, dtype=torch.int64, device=device)

    def fits(images: int) -> bool:
        try:
            # The second has AdamW's moments besides.
            for _ in range(2):
                program.gradient(random_batch(method, images, device), rng)
                program.update(rng, 1.0)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return False
        finally:
            engine.discard()
            torch.cuda.empty_cache()
        return True

    torch.cuda.set_per_process_memory_fraction(SHARE, device)
    try:
        yield fits, f"steps tried in {SHARE:.0%} of the device's memory"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def random_batch(method: methods.Method, images: int, device: torch.device) -> Batch:
    shapes = ((images, method.model.in_chans, *crop.size) for crop in method.crops)
    crops = tuple(torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes)
    return Batch(crops, torch.arange(images, device=device))


@contextmanager
def _computed(
    config: TrainConfig, model: ModelSpec, device: torch.device, choice: engines.Choice
) -> Iterator[tuple[Callable[[int], bool], str]]:
    """By the memory model: state, and what a step allocates, which grows by the same amount with each image."""
    with torch.device("meta"):
        method = methods.build(config.method, model, config.options, config.seed)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters()) - trained
    world = dist.launched_world()
    state = engines.state_bytes(choice.engine, choice.stage, choice.offload, world, trained, frozen)
    given = memory_bytes(device)
    room = SHARE * (host_bytes() if given is None else given) - state
    low, high = (method.batch_multiple * count for count in (1, 3))

    def peak(images: int) -> int:
        # The state has the gradients.
        return trace_step(
            config.method, model, config.options, images, low_precision=config.precision != "fp32", gradient_share=0.0,
            policy=config.checkpointing, device=device.type,
        ).peak  # fmt: skip

    least, each = peak(low), (peak(high) - peak(low)) / (high - low)
    crops = sum(math.prod(crop.size) * model.in_chans for crop in method.crops)
    how = f"computed: {each / 2**20:.1f} MiB an image, {state / 2**30:.1f} GiB of state, {(room + state) / 2**30:.1f} GiB to use"
    yield lambda images: least + each * (images - low) + 2 * crops * images <= room, how


def host_bytes() -> float:
    """Memory that the host, or what contains this process, has to give to each of its processes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resolve(found: Found, world: int, accumulate: int | None) -> int:
    """The batch size of the run that `find_batch` leads to.

    Raises:
        ConfigError: no image fits.
    """
    if found.images == 0:
        raise ConfigError(
            f"--batch-size auto: expected room for one image, got none ({found.how}); take a smaller --model or "
            f"--image-size, --checkpointing blocks, or --zero 3"
        )
    return found.images * world * (accumulate or 1)
