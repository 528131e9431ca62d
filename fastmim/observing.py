"""What is measured and drawn beside training: k-NN accuracy of the encoder, and reconstructions."""

from contextlib import ExitStack
from pathlib import Path

import torch
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.index import ImageIndex

from fastmim import compiling, dist
from fastmim.config import TrainConfig
from fastmim.engine.base import Engine
from fastmim.evaluate.knn import measure, raw_pixels
from fastmim.methods.base import Method
from fastmim.metrics import Display
from fastmim.pictures import write_pictures
from fastmim.trainer import Periodic, Trainer

# During training, k-NN uses at most so many training images: 50 per class of ImageNet.
KNN_LIMIT = 50_000
PICTURES = 8


class Observer:
    """Looks at a method while it is trained; every rank takes part.

    Args:
        config: the run.
        method, engine: what is trained.
        train, val: images; None: there are none.
        out: run directory, which receives the pictures.
        display: where to say things.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        engine: Engine,
        train: ImageIndex | None,
        val: ImageIndex | None,
        out: Path,
        display: Display,
    ):
        self.config, self.method, self.engine = config, method, engine
        self.train, self.val, self.out, self.display = train, val, out, display
        self._said: set[str] = set()

    def periodics(self, trainer: Trainer) -> list[Periodic]:
        """What the trainer shall do beside steps."""
        periodics = [Periodic(self.draw, trainer.steps_of(self.config.reconstruct_every), at_start=False)]
        why_not = self._why_no_knn()
        if why_not:
            self.display.say(f"k-NN      not measured: {why_not}")
        else:
            periodics.append(Periodic(self.knn, trainer.steps_of(self.config.knn_every), at_start=True))
        return periodics

    def _why_no_knn(self) -> str | None:
        if self.train is None or self.val is None:
            return "it needs --val-data"
        if self.train.labels is None or self.val.labels is None:
            return "it needs class folders in --data and --val-data"
        return None

    def knn(self, step: int) -> dict[str, float]:
        """Accuracy of the encoder; at the start that of raw pixels, too."""
        with self._evaluating():
            accuracy = self._accuracy(self._features)
        result = {"knn_top1": accuracy}
        if step == 0:
            result["knn_top1_raw_pixels"] = self._accuracy(raw_pixels)
        text = f"k-NN      step {step}: {100 * accuracy:.1f} % of the validation images right"
        self.display.say(text + (f" (raw pixels: {100 * result['knn_top1_raw_pixels']:.1f} %)" if step == 0 else ""))
        return result

    def _evaluating(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.engine.whole())
        if self.config.compile != "off":
            stack.enter_context(compiling.uncompiled())
        return stack

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with self.engine.autocast():
            return self.method.encoder.features(images)

    def _accuracy(self, features) -> float:
        return measure(
            features, self.train, self.val, self.method.model, self.engine.device, workers=self.config.workers,
            limit=KNN_LIMIT, on_bad_image=self.config.on_bad_image, say=self._say_once,
        )  # fmt: skip

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.display.say(text)

    @torch.no_grad()
    def draw(self, step: int) -> dict[str, float]:
        """Writes a picture of what the method makes of a few images; adds nothing to the metrics."""
        index = self.val or self.train
        if index is None:
            return {}
        few = self._few(index)
        if few is None:
            return {}
        images, ids = few
        rng = torch.tensor([self.config.seed, 0], device=self.engine.device)
        with self._evaluating(), self.engine.autocast():
            pictures = self.method.reconstruct(images, ids, rng)
        if pictures is not None and dist.is_main():
            write_pictures(pictures, self.out / "reconstructions" / f"step-{step:07d}.png")
        return {}

    def _few(self, index: ImageIndex) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same few images every time, on every rank; None if none of them can be read."""
        reader = EvalReader(
            index, self.method.model.image_size, batch_size=PICTURES, in_chans=self.config.in_chans, workers=0,
            limit=PICTURES, on_bad_image=self.config.on_bad_image,
        )  # fmt: skip
        batch = next(iter(reader), None)
        if batch is None:
            return None
        images, _, ids = batch
        return images.to(self.engine.device), ids.to(self.engine.device)
