"""What a training method is, and how one is found by name.

A method is one file in this folder that defines `METHOD` (a `Method`), `Config` (its options, a frozen dataclass) and
`PRESETS` (at least `demo` and `paper`). Nothing else has to be edited to add one.
"""

import dataclasses
import importlib
import math
import pkgutil
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor, nn

from fastmim.config import ConfigError, ModelSpec, check_range, nearest
from fastmim.contrast import Representations
from fastmim.conv import ConvEncoder
from fastmim.ema import EmaPair
from fastmim.targets import Reconstruction
from fastmim.vit import Encoder


class StepOutput(NamedTuple):
    """Result of one forward pass over a micro-batch."""

    loss: Tensor
    """Scalar; the mean over the micro-batch."""
    parts: dict[str, Tensor]
    """Detached terms of the loss, as they enter the sum; logged as loss/<name>."""
    measures: dict[str, Tensor] = {}  # noqa: RUF012 - never written to
    """Other detached scalars worth a curve."""


class Preset(NamedTuple):
    """Defaults of one recipe.

    Args:
        train: fields of TrainConfig.
        options: the method's Config.
        models: fields of TrainConfig that depend on --model.
    """

    train: dict[str, Any]
    options: Any
    models: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - never written to


class Method(nn.Module):
    """A self-supervised training method.

    `forward` is the only way into training and has no side effects: no EMA, no counters, no reading of the device.
    """

    Config: ClassVar[type]
    mixes_images: ClassVar[bool] = False
    """Whether the loss of an image depends on all others of its micro-batch: accumulation then changes the result, unless
    the method defines `represent`."""
    batch_multiple: int = 1
    """The images of a rank's micro-batch come in groups of so many."""
    notes: tuple[str, ...] = ()
    """What the user should know of the choices made for him; printed at the start."""
    stems: ClassVar[tuple[str, ...]] = ("patch",)
    """Values of --stem that the method can train."""
    ungraded: ClassVar[tuple[str, ...]] = ()
    """Trained networks that `forward` also runs without gradient, to make targets."""
    crops: tuple[CropSpec, ...]
    first_box: tuple[float, float, float, float] | None = None
    """Where in every image the crops with `uses_boxes` have their centers at first: top, left, bottom, right in shares."""
    box_updates: tuple[float, ...] = ()
    """Shares of the run; at the epoch starts nearest to them, each image gets a box of its own from `heat_map`."""
    encoder: Encoder

    @classmethod
    def encoder_class(cls, model: ModelSpec) -> type[nn.Module]:
        """The class of the encoder: `Encoder`, or what takes and gives the same. Export builds it from its `design`."""
        return {"patch": Encoder, "conv": ConvEncoder}[model.stem]

    def __init__(self, model: ModelSpec):
        super().__init__()
        if model.stem not in self.stems:
            raise ConfigError(f"--stem: expected one of {', '.join(self.stems)} for this method, got {model.stem}")
        self.model = model

    def forward(self, batch: Batch, rng: Tensor) -> StepOutput:
        """One training pass.

        Args:
            batch: uint8 master crops (B, C, S, S), one per entry of `crops`, and (B,) global sample ids.
            rng: (2,) int64 on the device: seed and step. Everything random is a function of it and of the ids.
        """
        raise TypeError(f"{type(self).__name__}.forward: expected the method to define it; see methods/base.py")

    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        """What the contrast needs of each image, without gradient. With it, N micro-batches equal one big batch.

        A method that defines this takes `rest: Rest | None = None` as third argument of `forward`, and contrasts
        `among(rest, online)` where it is given.
        """
        raise TypeError(f"{type(self).__name__}.represent: expected the method to define it; see contrast.py")

    @classmethod
    def can_represent(cls) -> bool:
        return cls.represent is not Method.represent

    def ema_pairs(self) -> list[EmaPair]:
        """Target parameters that follow online ones after each applied step."""
        return []

    def momentum(self, progress: float) -> float:
        """EMA factor at `progress` in [0, 1] of the run."""
        return 1.0

    def no_decay(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay spares a parameter. Default: vectors and biases, timm's rule."""
        return parameter.ndim <= 1

    def heat_map(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 whole images of the model's size -> (B, h, w) floats, large where the object is."""
        raise TypeError(f"{type(self).__name__}.heat_map: expected the method to define it, since it has box_updates")

    def reconstruct(self, images: Tensor, ids: Tensor, rng: Tensor) -> Reconstruction | None:
        """Pictures of whole images, of what the encoder sees of them, and of the reconstruction; None if it has none.

        Args:
            images: (B, C, H, W) uint8 of the model's size.
            ids: (B,) sample ids, which with `rng` choose the masks.
        """
        return None

    def export(self) -> dict[str, Tensor]:
        """Weights of the encoder alone."""
        return {name: tensor.detach() for name, tensor in self.encoder.state_dict().items()}


def available() -> list[str]:
    """Names of all methods: the modules of this folder."""
    folder = importlib.import_module("fastmim.methods")
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name != "base")


def find(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        ConfigError: unknown name.
    """
    if name not in available():
        raise ConfigError(f"--method: expected one of {', '.join(available())}, got {name}{nearest(name, available())}")
    return importlib.import_module(f"fastmim.methods.{name}")


def build(name: str, model: ModelSpec, options: Any, seed: int) -> Method:
    """A method with its initial weights, which depend on nothing but the seed.

    Raises:
        ConfigError: an option is out of range.
    """
    check_finite(f"--{name}", options)
    low, high = getattr(options, "crop_scale", (1.0, 1.0))
    if not 0 < low <= high <= 1:
        raise ConfigError(f"--{name}.crop-scale: expected 0 < low <= high <= 1, got {low:g} {high:g}")
    torch.manual_seed(seed)
    return find(name).METHOD(model, options)


def check_finite(prefix: str, options: Any) -> None:
    """Raises ConfigError for the first number of a Config, or of one inside it, that is infinite or not a number."""
    for field in dataclasses.fields(options):
        flag, value = f"{prefix}.{field.name.replace('_', '-')}", getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check_finite(flag, value)
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                check_range(flag, number, -math.inf, math.inf)
