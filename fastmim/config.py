"""The run's configuration: frozen dataclasses, durations, and every check that needs more than one field.

A method's own options live in its file (`methods/<name>.py`, class `Config`); presets override the fields here.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

ModelName = Literal["vit_pico", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"]


class ConfigError(Exception):
    """A mistake in what the user asked for: printed as one line."""

    exit_code = 2


@dataclass(frozen=True)
class Duration:
    """A length of training: "40ep" (epochs, may be fractional) or "500st" (optimizer steps; a bare integer, too)."""

    amount: float
    unit: Literal["ep", "st"]

    @classmethod
    def parse(cls, text: "str | int | Duration", name: str = "duration") -> "Duration":
        if isinstance(text, Duration):
            return text
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|st)?", str(text).strip())
        if match is None or ("." in match[1] and match[2] != "ep"):
            raise ConfigError(f'{name}: expected epochs ("40ep") or steps ("500st" or 500), got {text!r}')
        return cls(float(match[1]), match[2] or "st")

    def steps(self, steps_per_epoch: int) -> int:
        return round(self.amount * steps_per_epoch) if self.unit == "ep" else int(self.amount)

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


@dataclass(frozen=True)
class ModelSpec:
    """What a method needs to know to build its networks.

    Args:
        name: size of the encoder.
        image_size: (height, width) of a view in pixels, each divisible by patch_size.
        patch_size: side of a square patch in pixels.
        in_chans: channels of an image.
        mean, std: per channel, of pixels in [0, 1].
        stem: what comes before the transformer blocks: "patch" or "conv" (see conv.py).
    """

    name: ModelName
    image_size: tuple[int, int]
    patch_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stem: str = "patch"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.in_chans


class Size(NamedTuple):
    width: int
    depth: int
    heads: int


# Sources: DeiT (Ti, S; arXiv 2012.12877 table 1), ViT (B, L, H; arXiv 2010.11929 table 1).
# ViT-g: DINOv2 (arXiv 2304.07193 table 17). vit_pico is ours, for CPUs and for trying things.
SIZES: dict[str, Size] = {
    "vit_pico": Size(128, 4, 4),
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1536, 40, 24),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# Number of TrainConfig -> least and largest value, and whether the least itself will do.
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("in_chans", "patch_size", "batch_size", "accumulate", "log_every", "keep"), (1, math.inf, True)),
    **dict.fromkeys(("steps", "epochs", "hang_after", "clip", "std"), (0, math.inf, False)),
    **dict.fromkeys(("lr", "base_lr", "weight_decay", "workers", "skip_budget"), (0, math.inf, True)),
    **dict.fromkeys(("warmup_start", "lr_end", "betas"), (0, 1, True)),
    "mean": (-math.inf, math.inf, True),
    "seed": (0, 2**63 - 1, True),
}


def check_range(flag: str, value: float, low: float, high: float = math.inf, *, low_included: bool = True) -> None:
    """Raises ConfigError unless the value of a flag is finite and in low .. high, with or without low itself."""
    # Not math.isfinite, which integers of many digits overflow.
    if -math.inf < value < math.inf and (low <= value if low_included else low < value) and value <= high:
        return
    if not math.isinf(high):
        wanted = f"a number in {low:g} .. {high:g}" if low_included else f"a number above {low:g}, up to {high:g}"
    elif not math.isinf(low):
        wanted = f"at least {low:g}, finite" if low_included else f"a finite number above {low:g}"
    else:
        wanted = "a finite number"
    raise ConfigError(f"{flag}: expected {wanted}, got {f'{value:g}' if isinstance(value, float) else value}")


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train an image encoder."""

    method: str = "cmae"
    """Training method: the name of a module in fastmim/methods."""
    preset: str = "demo"
    """Defaults of the other options: `demo` (minutes on a CPU) or `paper` (published recipe; the default with --data)."""
    model: ModelName = "vit_base"
    """Size of the encoder."""
    stem: Literal["patch", "conv"] = "patch"
    """What comes before the transformer blocks: one linear map per patch, or ConvMAE's two convolutional stages."""
    image_size: int | tuple[int, int] = 224
    """Side of a training view in pixels, or height and width."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Channels of an image: 1 (gray), 3 (RGB), 4, any number from .npy files or pages of TIFF files."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, of pixels in [0, 1]. Default: ImageNet's for 3 channels, else 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel. Default: ImageNet's for 3 channels, else 0.25."""
    data: Path | None = None
    """Folder of training images (any depth; labels serve k-NN only), or one with train/ and val/ inside."""
    val_data: Path | None = None
    """Folder of validation images, one folder per class: k-NN accuracy is measured on it."""
    loader: str = "auto"
    """auto, folder, tar, ffcv (a .beton file), hf, dali, nvimgcodec, or synthetic (random images, for timing)."""
    workers: int | None = None
    """Decoding processes per rank. Default: from the cores at hand."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image stops the run, or is replaced by another one and counted."""
    exclude: Path | None = None
    """Training images to leave out: the list that `fastmim verify-data --write-list` has written."""
    batch_size: int | Literal["auto"] = 256
    """Images per optimizer step, over all processes and accumulated micro-batches; auto: as many as fit into memory."""
    accumulate: int | None = None
    """Micro-batches per optimizer step. Default: 1; on CPUs, for methods whose loss takes the images one by one, as many as
    keep every tensor of the step small: the result is the same, and memory is used again instead of fetched anew."""
    contrast_batch: Literal["step", "micro"] = "step"
    """What contrastive losses compare when there are several micro-batches: all images of the step, at the price of a pass
    without gradient, so that accumulation changes no result; or those of a micro-batch, which leaves fewer negatives."""
    epochs: float | None = None
    """Length of the run in passes over the data (or give --steps)."""
    steps: int | None = None
    """Length of the run in optimizer steps (or give --epochs)."""
    lr: float | None = None
    """Peak learning rate at this batch size. Default: base_lr x batch_size / 256."""
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    warmup: str = "0st"
    """Linear warm-up, as "40ep" or "500st"."""
    warmup_start: float = 0.0
    """Learning rate of the first step as a fraction of the peak."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: half a cosine, or constant with one step to a tenth at 7/8 of the run."""
    lr_end: float = 0.0
    """Learning rate at the end of the cosine as a fraction of the peak."""
    clip: float | None = None
    """Largest norm of the gradient; none: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of matrix products; parameters stay fp32. auto: bf16 where the device has it."""
    fp8: Literal["off", "targets", "wide"] = "off"
    """Products of 8-bit floats in the blocks' linear layers: in passes without gradient (momentum encoders, CAE's targets), or
    also in training, where layers have at least 1024 inputs and outputs. For GPUs of compute capability 8.9 or more, with bf16."""
    compile: Literal["off", "blocks"] = "off"
    """torch.compile of every transformer block; each shape takes a minute at first."""
    graph: Literal["auto", "on", "off"] = "auto"
    """A whole step as one CUDA graph, which takes the host's launches off the GPU. auto: with one GPU; on: with several, too."""
    checkpointing: Literal["none", "mlp", "blocks"] = "none"
    """What is computed again in the backward pass to save memory: nothing, the activations of MLPs, or whole blocks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    engine: Literal["auto", "single", "ddp", "zero"] = "auto"
    """How processes share the work."""
    zero: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage; implies --engine zero. One process has nothing to shard, and takes stage 0 for 1 to 3."""
    zero_offload: Literal["none", "optimizer", "all"] = "none"
    """What ZeRO keeps in the host's memory: the optimizer's state (--zero 1 to 3), or the parameters as well (--zero 3)."""
    seed: int = 0
    """Of everything random: initial weights, order, crops, masks."""
    out: Path | None = None
    """Run directory. Default: runs/<method>-<time>."""
    resume: str | None = None
    """Continue the run in --out from its newest checkpoint or a given step; `auto` starts anew if there is none."""
    save_every: str = "1ep"
    """Checkpoint interval, as "1ep" or "500st"."""
    keep: int = 2
    """Newest checkpoints to keep."""
    skip_budget: int = 5
    """Steps that may be skipped for a gradient that is not finite, among the last 1000; one more ends the run."""
    hang_after: float = 300
    """Seconds without any progress after which a run of several processes ends, and names the one that hangs."""
    log_every: int = 10
    """Steps between lines of metrics."""
    knn_every: str | None = None
    """Interval of k-NN evaluation besides the start and the end."""
    reconstruct_every: str | None = None
    """Interval of reconstruction pictures besides the end."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Also send the metrics to TensorBoard or Weights & Biases; metrics.jsonl is always written."""
    dry_run: bool = False
    """Check the options and the list of images, print the plan and the size of the model, and stop."""
    options: Annotated[Any, tyro.conf.Suppress] = None
    """The method's own options (its `Config`)."""

    def model_spec(self) -> ModelSpec:
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        imagenet = self.in_chans == 3
        mean = self.mean or (IMAGENET_MEAN if imagenet else (0.5,) * self.in_chans)
        std = self.std or (IMAGENET_STD if imagenet else (0.25,) * self.in_chans)
        return ModelSpec(self.model, size, self.patch_size, self.in_chans, tuple(mean), tuple(std), self.stem)

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256

    def total_steps(self, steps_per_epoch: int) -> int:
        if self.steps is not None:
            return self.steps
        return Duration(self.epochs, "ep").steps(steps_per_epoch)

    def check(self, world: int = 1, *, takes_auto: bool = False) -> None:
        """Raises ConfigError with one line for the first contradiction; touches no device and no data.

        Args:
            world: number of processes.
            takes_auto: whether the batch size may still be "auto".
        """
        for name, (low, high, low_included) in RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else () if value in (None, "auto") else (value,):
                check_range(f"--{name.replace('_', '-')}", number, low, high, low_included=low_included)
        if max(self.betas) == 1:
            raise ConfigError(f"--betas: expected numbers below 1, got {self.betas}")
        spec = self.model_spec()
        for side, name in zip(spec.image_size, ("height", "width")):
            if side < self.patch_size or side % self.patch_size:
                low = max(self.patch_size, side // self.patch_size * self.patch_size)
                raise ConfigError(
                    f"--image-size: expected a {name} divisible by the patch size {self.patch_size}, got {side}; "
                    f"take {low} or {low + self.patch_size}, or another --patch-size"
                )
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            if len(values) != self.in_chans:
                raise ConfigError(f"--{name}: expected {self.in_chans} values (--in-chans), got {len(values)}")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError("--epochs and --steps: expected one of them, got both")
        if self.epochs is None and self.steps is None:
            raise ConfigError("--epochs or --steps: expected one of them, got none")
        if self.batch_size == "auto" and not takes_auto:
            raise ConfigError("--batch-size: expected a number here, got auto, which only training can find")
        parts = world * (self.accumulate or 1)
        if self.batch_size != "auto" and self.batch_size % parts:
            low = max(parts, self.batch_size // parts * parts)
            raise ConfigError(
                f"--batch-size: expected a multiple of processes x --accumulate = {world} x {self.accumulate or 1}, "
                f"got {self.batch_size}; take {low} or {low + parts}"
            )
        if self.zero is not None and self.engine not in ("auto", "zero"):
            raise ConfigError(f"--zero {self.zero}: expected --engine zero or auto, got {self.engine}")
        least = {"none": 0, "optimizer": 1, "all": 3}[self.zero_offload]
        if least and (self.zero or 0) < least:
            raise ConfigError(
                f"--zero-offload {self.zero_offload}: expected --zero {least if least == 3 else '1, 2 or 3'}, got {self.zero}"
            )
        if self.engine == "single" and world > 1:
            raise ConfigError(f"--engine single: expected 1 process, got {world}; use ddp or zero")
        for name in ("warmup", "save_every", "knn_every", "reconstruct_every"):
            value = getattr(self, name)
            if value is not None:
                Duration.parse(value, f"--{name.replace('_', '-')}")
        if self.resume not in (None, "latest", "auto") and not self.resume.isdigit():
            raise ConfigError(f"--resume: expected nothing, a step number or auto, got {self.resume!r}")

    def check_groups(self, world: int, multiple: int) -> None:
        """Raises ConfigError where a micro-batch is not made of whole groups.

        Args:
            world: number of processes; the batch size is one that `check` accepts for it.
            multiple: the method's `batch_multiple`.
        """
        each = world * self.accumulate * multiple
        if self.batch_size % each:
            raise ConfigError(
                f"--batch-size: expected a multiple of {each} (processes x --accumulate x {multiple}, the images of a "
                f"group of {self.method}), got {self.batch_size}; take {max(1, self.batch_size // each) * each}"
            )


def count_kept(total: int, mask_ratio: float, name: str = "mask_ratio") -> int:
    """Number of units that stay visible: floor(total x (1 - mask_ratio)), in exact arithmetic.

    Source: facebookresearch/mae `int(L * (1 - mask_ratio))`, whose floating-point error drops a patch for some
    ratios (10 patches at 0.9 give 0); the ratio is taken as the decimal number that the user wrote.

    Raises:
        ConfigError: if the ratio is outside [0, 1) or keeps nothing.
    """
    if not 0 <= mask_ratio < 1:
        raise ConfigError(f"{name}: expected 0 <= ratio < 1, got {mask_ratio}")
    kept = math.floor(total * (1 - Fraction(str(mask_ratio))))
    if kept == 0:
        raise ConfigError(
            f"{name}: expected at least 1 of {total} units to stay visible, got ratio {mask_ratio}, which keeps 0; "
            f"take at most {math.floor((1 - Fraction(1, total)) * 1000) / 1000:g}"
        )
    return kept


def nearest(word: str, choices: list[str]) -> str:
    """ "; did you mean X?" or "" for an unknown word."""
    match = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def to_plain(config: Any) -> Any:
    """Dataclasses, paths and tuples -> what YAML and JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, (tuple, list)):
        return [to_plain(item) for item in config]
    return config


def from_plain(cls: type, plain: dict[str, Any]) -> Any:
    """The inverse of `to_plain` for one dataclass; fields that are missing keep their defaults."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in plain:
            value = plain[field.name]
            if dataclasses.is_dataclass(field.type):
                value = from_plain(field.type, value)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
