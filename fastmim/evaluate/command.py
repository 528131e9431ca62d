"""`fastmim knn`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from fastmim_pipelines.index import FolderIndex
from torch import Tensor

from fastmim.config import ConfigError
from fastmim.device import default_precision, pick_device
from fastmim.engine.base import Precise
from fastmim.evaluate.knn import measure, raw_pixels
from fastmim.export import load_encoder


def knn(
    checkpoint: tyro.conf.Positional[Path],
    data: Path,
    val_data: Path,
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    raw: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """k-nearest-neighbor accuracy of a frozen encoder (k = 20, cosine, mean over patch tokens).

    Args:
        checkpoint: encoder.safetensors, a checkpoint folder, or a run directory (its newest checkpoint).
        data: training images, one folder per class.
        val_data: validation images, one folder per class.
        batch_size: images per forward pass.
        workers: decoding processes; default: from the cores at hand.
        limit: use at most so many training images, evenly spread.
        device: where to compute.
        precision: arithmetic; auto is bf16 where the device has it.
        raw: measure plain pixels instead of features, for comparison.
    """
    encoder = load_encoder(checkpoint)
    place = pick_device(device)
    encoder.to(place).eval()
    precise = Precise(encoder, place.type, default_precision(place)[0] if precision == "auto" else precision)

    def features(images: Tensor) -> Tensor:
        with precise.autocast():
            return encoder.features(images)

    train = FolderIndex(data)
    val = FolderIndex(val_data, classes=train.classes or None)
    for index, flag in ((train, "--data"), (val, "--val-data")):
        if index.labels is None:
            raise ConfigError(f"{flag}: expected one folder per class below {index.root}, got images without a class")
    function = raw_pixels if raw else features
    accuracy = measure(function, train, val, encoder.model, place, batch_size=batch_size, workers=workers, limit=limit)
    print(f"k-NN top-1: {100 * accuracy:.2f} % ({len(val)} validation images, {limit or len(train)} training images)")
