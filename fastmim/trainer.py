"""The training loop. It knows a method, an engine and a loader by their protocols alone."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed
from fastmim_pipelines.spec import Batch, Loader

from fastmim import checkpoint
from fastmim.config import ConfigError, Duration, TrainConfig, to_plain
from fastmim.dist import StopAgreement, is_main, world_size
from fastmim.engine.base import Engine
from fastmim.methods.base import Method
from fastmim.metrics import Clock, Display, Meter, MetricsFile, peak_mib
from fastmim.schedule import learning_rate

# Skipped (non-finite) steps in a row of log intervals that end a run. Source: design rule, reliability over hope.
SKIP_BUDGET = 5
# What a checkpoint must agree on with the run that continues it.
FIXED = ("method", "model", "image_size", "patch_size", "in_chans", "batch_size", "seed", "options")


class NonFiniteError(Exception):
    """The loss or the gradient stopped being finite."""

    exit_code = 5


class Periodic(NamedTuple):
    """Something to do at the start, every `every` steps (0: never), and at the end of a run.

    `action` is called with the step, on every rank, and returns what to add to metrics.jsonl.
    """

    action: Callable[[int], dict[str, float]]
    every: int
    at_start: bool


class Boxes(Protocol):
    """What decides where crops are cut. It has a state, which is part of a checkpoint."""

    def prepare(self, step: int) -> None:
        """Called on every rank before the batch of step `step` is asked for."""
        ...

    def values(self) -> dict[str, float]:
        """What to add to metrics.jsonl."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Stop:
    """Remembers that the process was asked to end; a second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is not None and number != signal.SIGUSR1:
            sys.stdout.flush()
            os._exit(128 + number)  # killed without saving
        self.signal = number

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """Runs a method to the end of its schedule, from any step.

    Args:
        config: the run.
        method, engine, loader: see their protocols.
        out: run directory.
        display: where to say things.
        track: receives every record that goes to metrics.jsonl.
        boxes: gives the loader its boxes; None: the method's crops use none.
        mfu: share of the devices' peak at a number of images per second; None where it is not known.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        engine: Engine,
        loader: Loader,
        out: Path,
        display: Display,
        track: Callable[[dict], None] = lambda record: None,
        boxes: Boxes | None = None,
        mfu: Callable[[float], float | None] = lambda images_per_s: None,
    ):
        self.config, self.method, self.engine, self.loader = config, method, engine, loader
        self.out, self.display, self.track, self.boxes, self.mfu = out, display, track, boxes, mfu
        self.steps_per_epoch = loader.steps_per_epoch
        self.total = config.total_steps(self.steps_per_epoch)
        self.warmup = self.steps_of(config.warmup)
        self.save_every = max(1, self.steps_of(config.save_every))
        self.checkpoints = out / "checkpoints"
        self.step = 0
        self.saved_step: int | None = None
        self.pairs = method.ema_pairs()
        self.skipped = 0.0
        self.file: MetricsFile | None = None

    def steps_of(self, duration: str | None) -> int:
        return 0 if duration is None else Duration.parse(duration).steps(self.steps_per_epoch)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def resume(self, wanted: str) -> None:
        """Loads the newest valid checkpoint, or that of a given step; "auto" starts anew if there is none.

        Raises:
            CheckpointError: nothing valid to continue from.
            ConfigError: the checkpoint is of another run.
        """
        found = torch.full((), -1, dtype=torch.int64, device=self.engine.device)
        error = None
        if is_main():
            try:
                if wanted == "auto" and not checkpoint.steps_on_disk(self.checkpoints):
                    found.fill_(-2)
                else:
                    step = int(wanted) if wanted.isdigit() else None
                    folder, manifest = checkpoint.find(self.checkpoints, step, self.display.say)
                    self._check_same_run(folder, manifest["meta"]["config"])
                    found.fill_(manifest["step"])
            except (checkpoint.CheckpointError, ConfigError) as e:
                error = e
        if world_size() > 1:
            torch.distributed.broadcast(found, 0)
        if error is not None:
            raise error
        step = int(found)
        if step == -1:
            raise checkpoint.CheckpointError("rank 0 found no checkpoint to resume from; see its message")
        if step == -2:
            self.display.say("--resume auto: no checkpoint yet, starting anew")
            return
        self.engine.load(self.checkpoints / checkpoint.folder_name(step))
        if self.boxes is not None:
            self.boxes.load(self.checkpoints / checkpoint.folder_name(step))
        self.step = self.saved_step = step
        if is_main():
            later = checkpoint.set_aside(self.checkpoints, step)
            if later:
                self.display.say(f"moved the later checkpoints {later} to {self.checkpoints / 'abandoned'}")
        self.display.say(f"resumed at step {step} of {self.total}")

    def _check_same_run(self, folder: Path, saved: dict) -> None:
        ours = to_plain(self.config)
        for name in FIXED:
            if saved.get(name) != ours[name]:
                raise ConfigError(
                    f"--resume: {folder} was trained with {name} = {saved.get(name)}, this run has {ours[name]}; "
                    f"use the same value, or start anew with another --out"
                )

    def save(self) -> None:
        """Writes a checkpoint of this step; collective."""
        if self.saved_step == self.step:
            return
        temporary = checkpoint.prepare(self.checkpoints) if is_main() else self.checkpoints
        self.engine.save(temporary)
        if is_main():
            if self.boxes is not None:
                self.boxes.save(temporary)
            meta = {
                "config": to_plain(self.config), "model": to_plain(self.config.model_spec()), "world": world_size(),
                "encoder": self.method.encoder.design,
            }  # fmt: skip
            checkpoint.commit(temporary, self.checkpoints, self.step, meta, self.config.keep)
        if world_size() > 1:
            torch.distributed.barrier()
        self.saved_step = self.step

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, periodics: list[Periodic] = ()) -> bool:
        """Trains to the end.

        Returns:
            True at the end of the schedule, False if a signal asked to stop: then a checkpoint was saved.

        Raises:
            NonFiniteError: after too many steps with a non-finite gradient.
        """
        stop, agreement = Stop(), StopAgreement()
        if is_main():
            self.file = MetricsFile(self.out / "metrics.jsonl", self.step)
        try:
            if self.step == 0:
                self._run_periodics(periodics)
            meter, clock = Meter(self.engine.device), Clock()
            rng = torch.tensor([self.config.seed, self.step], device=self.engine.device)
            batches = self._batches()
            while self.step < self.total:
                clock.began += self._prepare_boxes()
                began = time.perf_counter()
                batch = next(batches)
                clock.waited += time.perf_counter() - began
                lr = self._train_step(batch, rng, meter)
                self.step += 1
                rng[1] += 1
                clock.steps += 1
                self.display.step(self.step)
                if self.step % self.config.log_every == 0 or self.step == self.total:
                    self._log(lr, meter, clock)
                asked = agreement.agreed(stop.signal is not None)
                if self.step % self.save_every == 0 or self.step == self.total or asked:
                    self.save()
                if asked and self.step < self.total:
                    self.display.say(f"stopped by signal at step {self.step}: saved; add --resume to continue")
                    return False
                clock.began += self._run_periodics(periodics)
            return True
        finally:
            stop.restore()
            if self.file is not None:
                self.file.close()

    def _prepare_boxes(self) -> float:
        """Returns how many seconds that took."""
        began = time.perf_counter()
        if self.boxes is not None:
            self.boxes.prepare(self.step)
        return time.perf_counter() - began

    def _batches(self) -> Iterator[Batch]:
        epoch, offset = divmod(self.step, self.steps_per_epoch)
        while True:
            yield from self.loader.epoch(epoch, offset)
            epoch, offset = epoch + 1, 0

    def _train_step(self, batch: Batch, rng: torch.Tensor, meter: Meter) -> float:
        config, engine = self.config, self.engine
        lr = learning_rate(
            self.step, total=self.total, warmup=self.warmup, peak=config.peak_lr, warmup_start=config.warmup_start,
            end=config.lr_end, schedule=config.schedule,
        )  # fmt: skip
        engine.set_lr(lr)
        for micro in _split(batch, config.accumulate, engine.device):
            out = engine.forward(micro, rng)
            engine.backward(out.loss)
            parts = {f"loss/{name}": value for name, value in out.parts.items()}
            meter.add(loss=out.loss, **parts, **out.measures)
        info = engine.step()
        engine.ema(self.pairs, self.method.momentum(self.step / self.total))
        meter.add(grad_norm=info.grad_norm, skipped=~info.applied)
        return lr

    def _log(self, lr: float, meter: Meter, clock: Clock) -> None:
        steps = clock.steps
        values = meter.read()
        skipped = round(values.pop("skipped") * steps)
        self.skipped = self.skipped + skipped if skipped else 0
        record = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": values.pop("loss"),
            "lr": lr,
            "grad_norm": values.pop("grad_norm"),
            **clock.read(self.config.batch_size),
            "peak_mib": peak_mib(self.engine.device),
            "skipped_steps": skipped,
            **values,
            **({} if self.boxes is None else self.boxes.values()),
        }
        share = self.mfu(record["images_per_s"])
        if share is not None:
            record["mfu"] = share
        self._write(record)
        self.display.record(record)
        if self.skipped > SKIP_BUDGET:
            raise NonFiniteError(
                f"step {self.step}: {self.skipped:.0f} steps were skipped for a non-finite gradient; no weight was touched "
                f"by them; try --precision fp32, --clip 1, or a lower --lr, and resume"
            )

    def _run_periodics(self, periodics: list[Periodic]) -> float:
        """Runs what is due; returns how many seconds that took."""
        began = time.perf_counter()
        for periodic in periodics:
            due = self.step > 0 and periodic.every > 0 and self.step % periodic.every == 0
            if due or (self.step == 0 and periodic.at_start) or self.step == self.total:
                values = periodic.action(self.step)
                if values:
                    self._write({"step": self.step, "epoch": self.step / self.steps_per_epoch, **values})
        return time.perf_counter() - began

    def _write(self, record: dict) -> None:
        if self.file is not None:
            self.file.write(record)
            self.track(record)


def _split(batch: Batch, parts: int, device: torch.device) -> Iterator[Batch]:
    """Micro-batches of a rank's share, moved to the device."""
    crops = [crop.to(device, non_blocking=True).chunk(parts) for crop in batch.crops]
    ids = batch.ids.to(device, non_blocking=True).chunk(parts)
    for i in range(parts):
        yield Batch(tuple(c[i] for c in crops), ids[i])
