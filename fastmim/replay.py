"""`fastmim replay CAPTURE`: takes a step that was skipped again, and shows where it stops being finite.

A capture is a folder in the run's captures/: the weights before the step, the boxes that its crops were drawn around, and
in its manifest the place in the data and what came out. The step is taken in one process; its images and masks are those
of the run's, whatever its processes were.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from fastmim_pipelines.spec import Batch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmim import checkpoint, float8
from fastmim.arguments import parse_plain
from fastmim.boxes import read_boxes
from fastmim.config import ConfigError
from fastmim.contrast import Rest, join
from fastmim.engine.base import MODEL_FILE, Precise
from fastmim.methods import base as methods
from fastmim.session import Session

REPRODUCED, NOT_REPRODUCED = 0, 1
# Settings that say how a run was computed, not what.
OF_THE_RUN = ("resume", "out", "engine", "zero", "zero_offload", "graph", "compile", "checkpointing")


class Culprit(NamedTuple):
    """A tensor that is not finite."""

    name: str
    bad: int
    size: int
    sha256: str
    """Of its bytes: two replays on one machine give the same."""

    def __str__(self) -> str:
        return f"{self.name}: {self.bad} of {self.size} numbers (SHA-256 {self.sha256[:16]})"


class Replayed(NamedTuple):
    losses: list[float]
    forward: list[Culprit]
    """Outputs of modules, in the order in which they were computed."""
    gradients: list[Culprit]
    """Of parameters, in the order of the model."""


def replay(capture: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CAPTURE")]) -> int:
    """Take a skipped step again and name the first tensor that is not finite.

    Args:
        capture: A folder step-... in captures/ of a run.
    """
    meta = checkpoint.verify(capture)["meta"]
    result = run(capture, meta)
    print(f"loss      {', '.join(map(repr, result.losses))}; in the run {', '.join(meta['losses'])}")
    for what, found in (("forward", result.forward), ("gradient", result.gradients)):
        print(f"{what:<9} {f'{len(found)} not finite; first: {found[0]}' if found else 'all finite'}")
    if result.forward or result.gradients:
        print("done      reproduced: the step is not finite with these weights and images")
        return REPRODUCED
    print(
        "done      not reproduced: the same weights and images give finite numbers here. If device and precision are "
        "the run's, suspect its hardware; `fastmim info` on that host"
    )
    return NOT_REPRODUCED


def run(capture: Path, meta: dict[str, Any]) -> Replayed:
    """The step's forward and backward passes under watch.

    Raises:
        ConfigError: the data are not the run's.
    """
    step = checkpoint.verify(capture)["step"]
    plain = {k: v for k, v in meta["config"].items() if k not in OF_THE_RUN}
    session = Session(parse_plain(plain))
    config, device = session.config, session.device
    method = methods.build(config.method, session.model, config.options, config.seed)
    method.load_state_dict(load_file(capture / MODEL_FILE))
    float8.convert(method, config.fp8)
    precise = Precise(method.to(device), device.type, config.precision)
    loader, _ = session.loader()
    try:
        boxes = read_boxes(capture)
        if boxes is not None:
            loader.set_boxes(boxes)
        batch = next(iter(loader.epoch(*divmod(step, meta["steps_per_epoch"]))))
    finally:
        loader.close()
    if batch.ids.tolist() != meta["ids"]:
        raise ConfigError(f"{capture}: expected the images of the run in {config.data}, got others; use the same data")
    rng = torch.tensor([config.seed, step], device=device)
    micros = [_rows(batch, rows, device) for rows in micro_rows(len(batch.ids), meta["world"], config.accumulate)]
    rests: list[tuple[Rest, ...]] = [()] * len(micros)
    if config.accumulate > 1 and config.contrast_batch == "step" and method.mixes_images and method.can_represent():
        rests = [(rest,) for rest in join([precise.represent(micro, rng) for micro in micros])]
    watch = Watch(method)
    losses = []
    for micro, rest in zip(micros, rests):
        out = precise(micro, rng, *rest)
        losses.append(out.loss.item())
        (out.loss / config.accumulate).backward()
    gradients = [c for n, p in method.named_parameters() if p.grad is not None and (c := culprit(n, p.grad))]
    return Replayed(losses, watch.found, gradients)


def micro_rows(count: int, world: int, accumulate: int) -> list[list[int]]:
    """Rows of a step's batch that were computed together: a micro-batch of every rank."""
    local = count // world
    micro = local // accumulate
    return [
        [rank * local + part * micro + i for rank in range(world) for i in range(micro)] for part in range(accumulate)
    ]


def _rows(batch: Batch, rows: list[int], device: torch.device) -> Batch:
    return Batch(tuple(crop[rows].to(device) for crop in batch.crops), batch.ids[rows].to(device))


class Watch:
    """Remembers which modules gave numbers that are not finite."""

    def __init__(self, method: nn.Module):
        self.found: list[Culprit] = []
        for name, module in method.named_modules():
            if name:
                module.register_forward_hook(lambda module, args, out, name=name: self._look(name, out))

    def _look(self, name: str, out: Any) -> None:
        for tensor in out if isinstance(out, tuple) else (out,):
            found = culprit(name, tensor) if isinstance(tensor, Tensor) else None
            if found is not None:
                self.found.append(found)


def culprit(name: str, tensor: Tensor) -> Culprit | None:
    bad = int((~tensor.detach().isfinite()).sum())
    if not bad:
        return None
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Culprit(name, bad, tensor.numel(), hashlib.sha256(data).hexdigest())
