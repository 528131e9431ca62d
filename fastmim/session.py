"""A training run put together: checks first, then data, processes, engine, loader; then the trainer."""

import dataclasses
from pathlib import Path

import torch
import yaml
from fastmim_kernels import chosen
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.spec import Loader

from fastmim import attention, autobatch, compiling, dist, float8
from fastmim.agreement import fingerprint
from fastmim.boxes import HeatBoxes
from fastmim.checkpoint import CheckpointError
from fastmim.config import ConfigError, TrainConfig, to_plain
from fastmim.device import default_precision, memory_bytes, pick_device
from fastmim.engine import base as engines
from fastmim.export import write_encoder
from fastmim.flops import mfu, peak_flops, training_flops
from fastmim.graph import choose_graph
from fastmim.memory import micro_batches
from fastmim.methods import base as methods
from fastmim.metrics import Display, check_tracker, open_tracker
from fastmim.observing import Observer
from fastmim.recompute import set_checkpointing
from fastmim.run_data import check_outside, open_loader, open_train, open_val, with_folders
from fastmim.run_directory import CONFIG_FILE, RUNS, RunDirectory, new_run
from fastmim.tokenizer import RecordedTarget, TokenTarget
from fastmim.tokenizer.recorded import record_tokens
from fastmim.trainer import Trainer

BOX_BATCH = 256


class Session:
    """Checks a configuration and makes everything that a run needs.

    Raises:
        ConfigError: before any device or process group is touched.
    """

    def __init__(self, config: TrainConfig):
        world = dist.launched_world()
        config.check(world, takes_auto=True)
        check_tracker(config.tracker)
        self.model = config.model_spec()
        self.device = pick_device(config.device)
        precision, why_precision = default_precision(self.device)
        if config.precision == "auto":
            config = dataclasses.replace(config, precision=precision)
        else:
            why_precision = f"--precision {config.precision} was given"
        with torch.device("meta"):
            plan = methods.build(config.method, self.model, config.options, config.seed)
        self.crops = plan.crops
        trained = sum(p.numel() for p in plan.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in plan.parameters()) - trained
        self.choice = engines.choose(
            config.engine, config.zero, world, trained, memory_bytes(self.device), frozen=frozen,
            offload=config.zero_offload,
        )  # fmt: skip
        if config.compile == "blocks":
            compiling.check(self.device, self.choice.stage)
        fp8_lines = float8.check(plan, config.fp8, self.device, config.precision)
        self.reads_host = isinstance(getattr(plan, "tokens", None), RecordedTarget)
        self.graph = choose_graph(
            config.graph, self.device, self.choice.engine, config.precision, reads_host=self.reads_host
        )
        self._check_resumable(config)
        config = with_folders(config)
        self.train_index = open_train(config, self.say)
        if config.batch_size == "auto":
            config = self._with_batch(config, plan)
            config.check(world)
        is_given = config.accumulate is not None
        if not is_given:
            config = dataclasses.replace(config, accumulate=micro_batches(config, plan, world, self.device))
        self.config = config
        self.val_index = open_val(config, self.train_index)
        self.say(f"method    {config.method}, preset {config.preset}, {config.model}/{config.patch_size} at "
                 f"{self.model.image_size[0]} x {self.model.image_size[1]}: {trained / 1e6:.1f} M parameters to train"
                 f"{f', {frozen / 1e6:.1f} M that follow' if frozen else ''}")  # fmt: skip
        self.say(f"engine    {self.choice.engine}{self._sharding()}: {self.choice.reason}")
        self.say(f"device    {self.device.type} x {world}, {config.precision}: {why_precision}")
        kernels = sorted(set(chosen(self.device.type).values()))
        self.say(f"kernels   {', '.join(kernels)} on {self.device.type} (`fastmim info` tells why)")
        self.say(f"graph     {'used' if self.graph.is_used else 'not used'}: {self.graph.reason}")
        if not is_given and config.accumulate > 1:
            self.say(
                f"micro     {config.accumulate} micro-batches a step, which is faster on CPUs (--accumulate 1 takes one)"
            )
        if plan.mixes_images and config.accumulate > 1:
            self._say_contrast(plan)
        self.config.check_groups(dist.launched_world(), plan.batch_multiple)
        formula = getattr(methods.find(config.method), "flops", None)
        self.flops = training_flops(config.method, self.model, config.options, formula)
        if self.flops is not None:
            self.say(f"cost      {self.flops.training / 1e9:.3g} GFLOP per image as published, forward and backward")
        for line in fp8_lines:
            self.say(line)
        for note in plan.notes:
            self.say(f"note      {note}")
        self.say(f"lr        {config.peak_lr:.3g} at batch {config.batch_size}")

    @staticmethod
    def _check_resumable(config: TrainConfig) -> None:
        """Before any data are made or read; of a run that is there, `Trainer.resume` looks at the checkpoints."""
        if config.resume in (None, "auto") or dist.launched_rank():
            return
        if config.out is None or not (config.out / "checkpoints").is_dir():
            raise CheckpointError(
                f"--resume: expected a run with checkpoints in {config.out or RUNS}, got none; check --out, or say --resume auto "
                "to start anew where there is nothing yet"
            )

    def _with_batch(self, config: TrainConfig, plan: methods.Method) -> TrainConfig:
        """The batch size that "auto" stands for: that of the run that goes on, or the largest that fits on every rank."""
        world = dist.launched_world()
        saved = int(dist.from_rank_0("batch of the run", str(_batch_of_run(config))))
        if saved:
            self.say(f"batch     {saved}, as in the run that goes on")
            return dataclasses.replace(config, batch_size=saved)
        most = autobatch.MOST_IMAGES
        if self.train_index is not None:
            most = min(most, len(self.train_index) // (world * (config.accumulate or 1)))
        found = autobatch.find_batch(config, self.model, self.device, self.choice, plan.batch_multiple, most)
        images = dist.judged_by_rank_0("batch size", str(found.images), lambda texts: str(min(map(int, texts))))
        batch_size = autobatch.resolve(found._replace(images=int(images)), world, config.accumulate)
        self.say(f"batch     {batch_size}, the largest that fits ({found.how})")
        return dataclasses.replace(config, batch_size=batch_size)

    def _micro_batch(self) -> int:
        return self.config.batch_size // (dist.launched_world() * self.config.accumulate)

    def _sharding(self) -> str:
        text = f", ZeRO stage {self.choice.stage}" if self.choice.engine == "zero" else ""
        on_host = {"none": "", "optimizer": ", optimizer on the host", "all": ", optimizer and parameters on the host"}
        return text + on_host[self.choice.offload]

    def _say_contrast(self, plan: methods.Method) -> None:
        c = self.config
        if plan.can_represent() and c.contrast_batch == "step":
            self.say(f"contrast  among all {c.batch_size} images of a step: each of the {c.accumulate} micro-batches "
                     f"takes one more pass, without gradient")  # fmt: skip
        else:
            self.say(f"warning   {c.method} compares the images of a micro-batch with each other: --accumulate "
                     f"{c.accumulate} leaves {c.batch_size // c.accumulate} of {c.batch_size}")  # fmt: skip

    def say(self, text: str) -> None:
        if dist.launched_rank() == 0:
            print(text, flush=True)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains. Returns False if a signal ended it early, with a checkpoint saved."""
        config = self.config
        check_outside(config.out or RUNS, (self.train_index, self.val_index))
        loader, reason = self.loader()
        self.say(f"loader    {reason}")
        if config.dry_run:
            self._print_plan(loader.steps_per_epoch)
            loader.close()
            return True
        directory, out = None, config.out or RUNS  # which rank 0 alone looks at
        if dist.launched_rank() == 0:
            out = config.out or new_run(config.method)
            directory = RunDirectory(out, resuming=config.resume is not None)
        if self.choice.engine != "single":
            # The watchdog shall be the first to speak.
            dist.start(self.device, max(600, 2 * config.hang_after))
        self.method = methods.build(config.method, self.model, config.options, config.seed)
        set_checkpointing(self.method, config.checkpointing)
        float8.convert(self.method, config.fp8)
        if config.compile == "blocks":
            self.say(f"compile   {compiling.compile_blocks(self.method)} blocks, when they first run")
        self.engine = engines.build(self.choice.engine, self.method, self._engine_spec())
        if self.choice.stage != 3 and not self.reads_host:  # weights in shards, or targets of images that are not there
            for line in attention.choose(self._trial_forward, self.device.type):
                self.say(line)
        total = config.total_steps(loader.steps_per_epoch)
        display = Display(total, enabled=dist.is_main())
        boxes = self._boxes(loader, total, display)
        trainer = Trainer(
            config, self.method, self.engine, loader, out, display, boxes=boxes, mfu=self._mfu,
            images=fingerprint(self.train_index), graph=config.graph if self.graph.is_used else "off",
        )  # fmt: skip
        observer = Observer(config, self.method, self.engine, self.train_index, self.val_index, out, display)
        try:
            if config.resume is not None:
                trainer.resume(config.resume)
            if directory is not None:
                directory.write_config(config)
                trainer.track = open_tracker(config.tracker, out)
            display.say(f"run       {out}: {total} steps, {loader.steps_per_epoch} per epoch")
            finished = trainer.fit(observer.periodics(trainer))
            if finished:
                self._finish(out, display, loader)
        finally:
            display.close()
            loader.close()
            if directory is not None:
                directory.close()
        if trainer.static is not None:
            trainer.static.release()
        self.engine.close()
        # Not after an error: the other ranks might never come to the farewell.
        dist.finish()
        return finished

    def record_tokens(self, folder: Path, steps: range) -> None:
        """Writes the token ids of some steps, for `--cae.tokens`."""
        config = self.config
        method = methods.build(config.method, self.model, config.options, config.seed)
        target = getattr(method, "tokens", None)
        if not isinstance(target, TokenTarget) or dist.launched_world() > 1:
            raise ConfigError(
                "record-tokens: expected --method cae with --cae.tokenizer FILE, in one process, got "
                f"{config.method} in {dist.launched_world()}"
            )
        loader, reason = self.loader()
        self.say(f"loader    {reason}")
        try:
            record_tokens(
                folder, loader, target.network, self.model, seed=config.seed, steps=steps, device=self.device
            )  # fmt: skip
        finally:
            loader.close()
        self.say(
            f"done      {folder}: tokens of steps {steps.start} to {steps.stop - 1}; train with --cae.tokens {folder}"
        )

    def loader(self) -> tuple[Loader, str]:
        """The run's loader, and why it is that one."""
        return open_loader(self.config, self.crops, self.train_index, self.device)

    def _mfu(self, images_per_s: float) -> float | None:
        if self.device.type != "cuda" or self.config.precision == "fp32":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return mfu(images_per_s, self.flops, None if peak is None else peak * dist.launched_world())

    def _boxes(self, loader: Loader, total: int, display: Display) -> HeatBoxes | None:
        is_noise = self.train_index is None or self.config.loader == "synthetic"
        if is_noise or not any(crop.uses_boxes for crop in self.crops):
            return None
        reader = EvalReader(
            self.train_index, self.model.image_size, batch_size=BOX_BATCH, rank=dist.rank(), world=dist.world_size(),
            in_chans=self.config.in_chans, workers=self.config.workers, size_ratio=None,
            on_bad_image=self.config.on_bad_image, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        return HeatBoxes(
            self.method, self.engine, loader, reader, count=len(self.train_index), total=total, say=display.say
        )

    def _engine_spec(self) -> engines.EngineSpec:
        c = self.config
        return engines.EngineSpec(
            device=self.device, precision=c.precision, accumulate=c.accumulate, micro_batch=self._micro_batch(),
            lr=c.peak_lr, weight_decay=c.weight_decay, betas=c.betas, clip=c.clip, zero_stage=self.choice.stage,
            zero_offload=self.choice.offload, has_graph=self.graph.is_used,
        )  # fmt: skip

    def _trial_forward(self) -> None:
        batch = autobatch.random_batch(self.method, self._micro_batch(), self.device)
        with compiling.uncompiled(), self.engine.autocast():
            self.method(batch, torch.zeros(2, dtype=torch.int64, device=self.device))

    def _print_plan(self, steps_per_epoch: int) -> None:
        total = self.config.total_steps(steps_per_epoch)
        self.say(f"plan      {total} steps, {steps_per_epoch} per epoch, {total * self.config.batch_size} images")
        for name, value in to_plain(self.config).items():
            self.say(f"  {name}: {value}")

    def _finish(self, out: Path, display: Display, loader: Loader) -> None:
        with self.engine.whole():
            if dist.is_main():
                write_encoder(self.method.encoder, self.config.method, out / "encoder.safetensors")
        bad = getattr(loader, "bad_images", [])
        if bad:
            display.say(f"data      {len(bad)} unreadable images were replaced; the first: {bad[0][0]}: {bad[0][1]}")
        display.say(f"done      {out}: encoder.safetensors, metrics.jsonl, checkpoints/, reconstructions/")


def _batch_of_run(config: TrainConfig) -> int:
    """The batch size of the run that is continued; 0 if there is none."""
    path = None if config.resume is None or config.out is None else config.out / CONFIG_FILE
    if path is None or not path.is_file():
        return 0
    return yaml.safe_load(path.read_text())["batch_size"]
