"""The images of a run: its folders, the lists of what is in them, and the loader that reads them."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from fastmim_pipelines import make_loader
from fastmim_pipelines.demo import write_demo
from fastmim_pipelines.index import ImageIndex, open_index, without
from fastmim_pipelines.spec import CropSpec, Loader

from fastmim import dist
from fastmim.config import ConfigError, TrainConfig

DEMO_DATA = Path("data/demo")


def with_folders(config: TrainConfig) -> TrainConfig:
    """Finds the folders: DIR/train and DIR/val, or the demo data, which is made if need be."""
    if config.loader == "synthetic":
        return config
    if config.data is None:
        if config.preset != "demo":
            raise ConfigError("--data: expected a folder of images, got none; or use --preset demo")
        if dist.launched_rank() == 0 and not config.dry_run:
            write_demo(DEMO_DATA, progress=print)
        config = dataclasses.replace(config, data=DEMO_DATA)
        if config.dry_run and not DEMO_DATA.exists():
            raise ConfigError(f"--data: {DEMO_DATA} does not exist yet; run `fastmim demo-data {DEMO_DATA}`")
        _wait_for(DEMO_DATA / "demo.json")
    data, val = config.data, config.val_data
    if (data / "train").is_dir():
        if val is None and (data / "val").is_dir():
            val = data / "val"
        data = data / "train"
    return dataclasses.replace(config, data=data, val_data=val)


def _wait_for(path: Path) -> None:
    """Ranks beside the one that writes the demo data wait for its last file."""
    while not path.exists():
        time.sleep(0.5)


def open_train(config: TrainConfig, say: Callable[[str], None]) -> ImageIndex | None:
    """What to train on: the images of --data without those of --exclude; None if the loader makes its own."""
    if config.data is None:
        return None
    try:
        # dali and nvimgcodec decode whatever there is.
        kind = config.loader if config.loader in ("folder", "tar", "ffcv", "hf") else "auto"
        index = open_index(config.data, kind)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    if config.exclude is None:
        return index
    kept = without(index, config.exclude)
    say(f"data      {len(index) - len(kept)} of {len(index)} images left out: {config.exclude}")
    return kept


def check_outside(out: Path, indices: Iterable[ImageIndex | None]) -> None:
    """Raises ConfigError if a run's folder lies among images, of which its pictures would be some for the next run."""
    for index in indices:
        if index is not None and index.kind == "folder" and out.resolve().is_relative_to(Path(index.root).resolve()):
            raise ConfigError(
                f"--out: expected a folder outside of the images in {index.root}, got {out}, whose pictures would be taken "
                f"for images; name another folder"
            )


def open_val(config: TrainConfig, train: ImageIndex | None) -> ImageIndex | None:
    """The images of --val-data, their classes numbered as in training."""
    if config.val_data is None:
        return None
    return open_index(config.val_data, classes=(train.classes if train else None) or None)


def open_loader(
    config: TrainConfig, crops: tuple[CropSpec, ...], index: ImageIndex | None, device: torch.device
) -> tuple[Loader, str]:
    """The run's loader, and why it is that one."""
    try:
        options: dict[str, Any] = dict(
            batch_size=config.batch_size, rank=dist.launched_rank(), world=dist.launched_world(), seed=config.seed,
            in_chans=config.in_chans,
        )  # fmt: skip
        if config.loader == "synthetic":
            # Noise stands for data that are there in time.
            options["device"] = device
        else:
            pin = device.type == "cuda"
            options |= dict(workers=config.workers, on_bad_image=config.on_bad_image, pin_memory=pin)
        return make_loader(config.loader, crops, data=index, **options)
    except (ValueError, ModuleNotFoundError) as e:
        raise ConfigError(str(e)) from e
