"""The training loop. It knows a method, an engine and a loader by their protocols alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from fastmim_pipelines.spec import Batch, Loader
from torch import Tensor

from fastmim import captures, checkpoint, dist
from fastmim.captures import Taken
from fastmim.config import ConfigError, Duration, TrainConfig, to_plain
from fastmim.dist import StopAgreement, is_main, world_size
from fastmim.engine.base import Engine, StepInfo
from fastmim.graph import CaptureError, StaticStep
from fastmim.methods.base import Method, StepOutput
from fastmim.metrics import Clock, Display, Meter, MetricsFile, peak_mib
from fastmim.nonfinite import WINDOW_STEPS, NonFiniteError, Skips
from fastmim.restarts import batches_from
from fastmim.resuming import check_same_run, exclusion
from fastmim.saving import Saver, stored
from fastmim.schedule import learning_rate
from fastmim.signals import Stop
from fastmim.step import StepProgram, to_device
from fastmim.watchdog import Pace, Watchdog


class Periodic(NamedTuple):
    """Something to do at the start, every `every` steps (0: never), and at the end of a run.

    `action` is called with the step, on every rank, and returns what to add to metrics.jsonl.
    """

    action: Callable[[int], dict[str, float]]
    every: int
    at_start: bool


class Boxes(Protocol):
    """What decides where crops are cut. It has a state, which is part of a checkpoint."""

    given: np.ndarray | None
    """What the loader has: (N, 4), see `Loader.set_boxes`."""

    def prepare(self, step: int) -> None:
        """Called on every rank before the batch of step `step` is asked for."""
        ...

    def values(self) -> dict[str, float]:
        """What to add to metrics.jsonl."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


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
        images: `agreement.fingerprint` of what is trained on.
        graph: "off" takes each step as it comes; "auto" and "on" take it through graph.py, which on a GPU captures it,
            and "on" ends the run where that fails.
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
        images: list[int] | None = None,
        graph: Literal["off", "auto", "on"] = "off",
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
        self.file: MetricsFile | None = None
        self.saver = Saver(self.checkpoints, config.keep, display.say)
        self.skips = Skips(config.skip_budget)
        self.taken: Taken | None = None
        self.watchdog = Watchdog(config.hang_after)
        self.pace = Pace()
        self.program = StepProgram(
            method, engine, config.accumulate, config.contrast_batch,
            at=lambda phase: self.watchdog.at(self.step, phase), add_time=self.pace.add,
        )  # fmt: skip
        self.graph, self.static = graph, None if graph == "off" else StaticStep(self.program)
        self.excluded, self.images = exclusion(config.exclude), images
        self.is_metrics_late = False

    def steps_of(self, duration: str | None) -> int:
        return 0 if duration is None else Duration.parse(duration).steps(self.steps_per_epoch)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def resume(self, wanted: str) -> None:
        """Loads the newest valid checkpoint, or that of a given step; "auto" starts anew if there is none.

        Raises:
            CheckpointError: nothing valid to continue from.
            ConfigError: the checkpoint is of another run.
        """
        found: dict = {}
        error = None
        if is_main():
            try:
                if wanted == "auto" and not checkpoint.steps_on_disk(self.checkpoints):
                    found = {"step": None}
                else:
                    step = int(wanted) if wanted.isdigit() else None
                    folder, manifest = checkpoint.find(self.checkpoints, step, self.display.say)
                    warning = check_same_run(folder, manifest["meta"], self.config, self.excluded, self.images)
                    if warning:
                        self.display.say(f"warning   {warning}")
                    found = {"step": manifest["step"], "state": manifest["meta"].get("state", {})}
            except (checkpoint.CheckpointError, ConfigError) as e:
                error = e
        found = json.loads(dist.broadcast_text(json.dumps(found), self.engine.device))
        if error is not None:
            raise error
        if not found:
            raise checkpoint.CheckpointError("rank 0 found no checkpoint to resume from; see its message")
        step = found["step"]
        if step is None:
            self.display.say("--resume auto: no checkpoint yet, starting anew")
            return
        folder = self.checkpoints / checkpoint.folder_name(step)
        with stored(folder, self.engine.device) as source:
            self.engine.load(source)
        if self.boxes is not None:
            self.boxes.load(folder)
        self._restore(found["state"])
        self.step = self.saved_step = step
        if is_main():
            later = checkpoint.set_aside(self.checkpoints, step)
            if later:
                self.display.say(f"moved the later checkpoints {later} to {self.checkpoints / 'abandoned'}")
            checkpoint.tidy(self.checkpoints, step, self.config.keep)
        self.display.say(f"resumed at step {step} of {self.total}")

    def _state(self) -> dict:
        """What a resumed run must know beside weights and step: budgets do not start anew. Collective."""
        tally = getattr(self.loader, "tally", None)
        images = None if tally is None else dist.sum_over_ranks(list(tally()), self.engine.device)
        return {"skipped_steps": self.skips.state(), "images": images}

    def _restore(self, state: dict) -> None:
        self.skips.restore(state.get("skipped_steps", []))
        restore = getattr(self.loader, "restore_tally", None)
        if state.get("images") is not None and restore is not None:
            # Every rank has a budget for its share of the images.
            restore(*(count // world_size() + (dist.rank() < count % world_size()) for count in state["images"]))

    def save(self, *, is_last: bool = False) -> None:
        """Copies the state to the host, from where it is written while training goes on; collective.

        Raises:
            StorageError: checkpoints cannot be written any more.
        """
        if self.saved_step != self.step:
            self._settle()
            if is_main():
                self.saver.wait()
            self.engine.save(self.saver.copy.put)
            state = self._state()
            if is_main():
                self.saver.copy.finish(self.engine.device)
                self.saver.start(self.step, self._meta() | {"state": state}, self._save_boxes)
            self.saved_step = self.step
        if is_last and is_main():
            self.saver.wait(is_last=True)

    def _meta(self) -> dict:
        return {
            "config": to_plain(self.config), "model": to_plain(self.config.model_spec()), "world": world_size(),
            "encoder": self.method.encoder.design, "excluded": self.excluded, "images": self.images,
        }  # fmt: skip

    def _save_boxes(self, folder: Path) -> None:
        if self.boxes is not None:
            self.boxes.save(folder)

    # -- steps that were skipped ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Counts the step before if it was skipped; to be called before weights change again. Collective.

        Raises:
            NonFiniteError: there were too many of them.
        """
        step = self.skips.settle()
        if step is None:
            return
        self.display.say(f"warning   step {step}: the gradient was not finite; no weight was touched by it")
        if self.skips.is_spent:
            folder = self._capture()
            count = len(self.skips.steps)
            self._write({"step": step, "epoch": step / self.steps_per_epoch, "skipped_steps": count})
            raise NonFiniteError(
                f"step {step}: {count} of the last {WINDOW_STEPS} steps were skipped for a non-finite gradient, more than "
                f"--skip-budget {self.skips.budget}; no weight was touched by them; `fastmim replay {folder}` shows where "
                f"it begins; try --precision fp32, --clip 1, or a lower --lr, and resume"
            )

    def _capture(self) -> Path:
        meta = self._meta() | {
            "seed": self.config.seed, "steps_per_epoch": self.steps_per_epoch, "skipped_steps": self.skips.state(),
        }  # fmt: skip
        return captures.keep(self.out / "captures", self.taken, self.engine, meta, self.display.say)

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
        self.watchdog.start()
        try:
            return self._fit(stop, agreement, periodics)
        finally:
            # A copy that is on the host becomes a checkpoint, whatever ended the training.
            self.watchdog.close()
            self.saver.finish()
            stop.restore()
            if self.file is not None:
                self.file.close()

    def _fit(self, stop: Stop, agreement: StopAgreement, periodics: list[Periodic]) -> bool:
        if self.step == 0:
            self._run_periodics(periodics)
        meter, clock = Meter(self.engine.device), Clock()
        rng = torch.tensor([self.config.seed, self.step], device=self.engine.device)
        batches = batches_from(self.loader, self.step)
        while self.step < self.total:
            clock.began += self._prepare_boxes()
            self.watchdog.at(self.step, "waiting for data")
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            clock.waited += waited
            self.pace.add(waited)
            lr = self._train_step(batch, rng, meter)
            self.watchdog.at(self.step, "after the update")
            self.step += 1
            clock.steps += 1
            self.pace.step()
            self.display.step(self.step)
            if self.step % self.config.log_every == 0 or self.step == self.total:
                self._log(lr, meter, clock, agreement)
            asked = agreement.agreed(stop.signal is not None)
            is_last = asked or self.step == self.total
            if self.step % self.save_every == 0 or is_last:
                self.watchdog.at(self.step, "saving")
                self.save(is_last=is_last)
            if asked and self.step < self.total:
                self.display.say(f"stopped by signal at step {self.step}: saved; add --resume to continue")
                return False
            clock.began += self._run_periodics(periodics)
        return True

    def _prepare_boxes(self) -> float:
        """Returns how many seconds that took."""
        began = time.perf_counter()
        if self.boxes is not None:
            self.watchdog.at(self.step, "looking for boxes")
            self.boxes.prepare(self.step)
        return time.perf_counter() - began

    def _train_step(self, batch: Batch, rng: Tensor, meter: Meter) -> float:
        config = self.config
        lr = learning_rate(
            self.step, total=self.total, warmup=self.warmup, peak=config.peak_lr, warmup_start=config.warmup_start,
            end=config.lr_end, schedule=config.schedule,
        )  # fmt: skip
        momentum = self.method.momentum(self.step / self.total)
        outputs, info = (self._take if self.static is None else self._take_static)(batch, rng, lr, momentum)
        self.skips.note(self.step, info.applied)
        boxes = None if self.boxes is None else self.boxes.given
        self.taken = Taken(self.step, batch.ids, [out.loss for out in outputs], info.grad_norm, boxes)
        for out in outputs:
            meter.add(loss=out.loss, **{f"loss/{name}": value for name, value in out.parts.items()}, **out.measures)
        meter.add(grad_norm=info.grad_norm, skipped=~info.applied)
        return lr

    def _take(self, batch: Batch, rng: Tensor, lr: float, momentum: float) -> tuple[list[StepOutput], StepInfo]:
        """A step: what each micro-batch gave, and what the update did."""
        self.engine.set_lr(lr)
        outputs = self.program.gradient(to_device(batch, self.engine.device), rng)
        self._settle()
        self.watchdog.at(self.step, "update")
        return outputs, self.program.update(rng, momentum)

    def _take_static(self, batch: Batch, rng: Tensor, lr: float, momentum: float) -> tuple[list[StepOutput], StepInfo]:
        """The same on tensors that stay in place."""
        # A graph changes weights before the flag of the step before is there. That matters where the flag may end the
        # run, since a capture needs the weights; else it is read afterwards, and the device never waits.
        if self.skips.is_last_chance:
            self._settle()
        try:
            result = self.static(batch, rng, lr, momentum)
        except CaptureError as e:
            if self.graph == "on":
                raise
            self.display.say(f"warning   {e}; training goes on without a graph")
            self.static.release()
            self.static = None
            return self._take(batch, rng, lr, momentum)
        self._settle()
        return result

    def _log(self, lr: float, meter: Meter, clock: Clock, agreement: StopAgreement) -> None:
        steps = clock.steps
        values = meter.read()
        skipped = round(values.pop("skipped") * steps)
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
        slow = self.pace.slowest(agreement.gather(self.pace.read()))
        if slow is not None:
            record["slowest_rank"] = slow.rank
        self._write(record)
        self.display.record(record)
        if slow is not None and slow.is_again:
            self.display.say(
                f"straggler rank {slow.rank}: {1e3 * slow.seconds:.0f} ms of data and forward per step, the median of the "
                f"others {1e3 * slow.others:.0f} ms"
            )

    def _run_periodics(self, periodics: list[Periodic]) -> float:
        """Runs what is due; returns how many seconds that took."""
        began = time.perf_counter()
        self.watchdog.at(self.step, "evaluating")
        for periodic in periodics:
            due = self.step > 0 and periodic.every > 0 and self.step % periodic.every == 0
            if due or (self.step == 0 and periodic.at_start) or self.step == self.total:
                values = periodic.action(self.step)
                if values:
                    self._write({"step": self.step, "epoch": self.step / self.steps_per_epoch, **values})
        return time.perf_counter() - began

    def _write(self, record: dict) -> None:
        if self.file is not None:
            try:
                self.file.write(record)
                self.is_metrics_late = False
            except OSError as e:
                # The line waits in the file's buffer for the next one.
                if not self.is_metrics_late:
                    self.display.say(f"warning   {self.out / 'metrics.jsonl'}: {e}; training goes on")
                self.is_metrics_late = True
            self.track(record)
