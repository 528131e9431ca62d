"""`fastmim knn` and `fastmim linear`: what the features of a frozen encoder are worth."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from fastmim_pipelines.index import open_index
from torch import Tensor

from fastmim.config import ConfigError
from fastmim.device import default_precision, pick_device
from fastmim.engine.base import Precise
from fastmim.evaluate.knn import measure as measure_knn
from fastmim.evaluate.knn import raw_pixels
from fastmim.evaluate.linear import measure as measure_linear
from fastmim.export import load_encoder
from fastmim.usage import parsed


@dataclass(frozen=True)
class Evaluation:
    """Which encoder, on which images."""

    checkpoint: tyro.conf.Positional[Path]
    """encoder.safetensors, a checkpoint folder, or a run directory (its newest checkpoint)."""
    data: Path
    """Training images, one folder per class."""
    val_data: Path
    """Validation images, one folder per class."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int | None = None
    """Decoding processes; default: from the cores at hand."""
    limit: int | None = None
    """Use at most so many training images, evenly spread."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image ends the command, or is left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto is bf16 where the device has it."""
    raw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure plain pixels instead of features, for comparison."""

    def run(self, measure: Callable[..., Any]) -> tuple[Any, str]:
        """What `measure` returns, and which images it saw."""
        encoder = load_encoder(self.checkpoint)
        place = pick_device(self.device)
        encoder.to(place).eval()
        precise = Precise(
            encoder, place.type, default_precision(place)[0] if self.precision == "auto" else self.precision
        )

        def features(images: Tensor) -> Tensor:
            with precise.autocast():
                return encoder.features(images)

        train = open_index(self.data)
        val = open_index(self.val_data, classes=train.classes or None)
        for index, flag in ((train, "--data"), (val, "--val-data")):
            if index.labels is None:
                raise ConfigError(
                    f"{flag}: expected one folder per class below {index.root}, got images without a class"
                )
        result = measure(
            raw_pixels if self.raw else features, train, val, encoder.model, place, batch_size=self.batch_size,
            workers=self.workers, limit=self.limit, on_bad_image=self.on_bad_image,
        )  # fmt: skip
        return result, f"({len(val)} validation images, {self.limit or len(train)} training images)"


def knn(argv: list[str]) -> None:
    """k-nearest-neighbor accuracy (k = 20, cosine, mean over patch tokens)."""
    evaluation = parsed(Evaluation, "fastmim knn", argv, description=inspect.cleandoc(knn.__doc__))
    accuracy, images = evaluation.run(measure_knn)
    print(f"k-NN top-1: {100 * accuracy:.2f} % {images}")


def linear(argv: list[str]) -> None:
    """Accuracy of logistic regression on standardized features; its weight decay is chosen on training images.

    For comparing encoders with each other: papers probe otherwise, and their figures are not comparable.
    """
    evaluation = parsed(Evaluation, "fastmim linear", argv, description=inspect.cleandoc(linear.__doc__))
    probe, images = evaluation.run(measure_linear)
    print(f"linear probe top-1: {100 * probe.top1:.2f} % {images}, weight decay {probe.weight_decay:g}")
