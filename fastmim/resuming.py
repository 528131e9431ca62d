"""What a run must have in common with the checkpoint that it continues."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fastmim.config import ConfigError, TrainConfig, to_plain

# Fields of the configuration that must be equal: with another one, the rest of the run would be another run.
FIXED = ("method", "model", "image_size", "patch_size", "in_chans", "mean", "std", "batch_size", "seed", "options")


def exclusion(path: Path | None) -> str | None:
    """SHA-256 of the names in a list of images to leave out, in any order; None without a list.

    The order of a run follows from the images that are left, wherever the list is and however it was written.
    """
    if path is None:
        return None
    names = sorted({json.loads(line)["name"] for line in path.read_text().splitlines() if line.strip()})
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def check_same_run(
    folder: Path, meta: dict[str, Any], config: TrainConfig, excluded: str | None, images: list[int] | None = None
) -> str | None:
    """Compares a checkpoint's run with this one.

    Args:
        folder, meta: of the checkpoint.
        config: this run's.
        excluded: this run's `exclusion`.
        images: `agreement.fingerprint` of this run's images.

    Returns:
        A warning, or None.

    Raises:
        ConfigError: they differ in something that must be equal.
    """
    saved, ours = meta["config"], to_plain(config)
    for name in FIXED:
        if saved.get(name) != ours[name]:
            raise ConfigError(
                f"--resume: {folder} was trained with {name} = {saved.get(name)}, this run has {ours[name]}; "
                f"use the same value, or start anew with another --out"
            )
    theirs = saved.get("exclude")
    # Older checkpoints know the list's path alone: whether there was one can be compared, and not what it said.
    is_same = meta["excluded"] == excluded if "excluded" in meta else (theirs is None) == (excluded is None)
    if not is_same:
        raise ConfigError(
            f"--resume: {folder} was trained with exclude = {theirs}, this run has {ours['exclude']}, which leaves out "
            f"other images; use the same list, or start anew with another --out"
        )
    then = meta.get("images")  # older checkpoints do not know
    if then is None or images is None or then == images:
        return None
    if then[0] != images[0]:
        raise ConfigError(
            f"--resume: {folder} was trained on {then[0]} images, {config.data} has {images[0]}, which would change the order "
            f"of all of them; use the same images, or start anew with another --out"
        )
    return f"{config.data} has as many images as the run began with, under other names: its order stays as it was"
