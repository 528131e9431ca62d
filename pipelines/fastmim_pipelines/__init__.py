"""fastmim_pipelines: image batches for masked image modeling, reproducible and seekable.

Importable alone: needs torch, NumPy and Pillow. `make_loader` is the front door; `spec` is the contract.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .spec import Batch, CropSpec, DataError, Loader

__all__ = ["LOADERS", "Batch", "CropSpec", "DataError", "Loader", "make_loader"]

# Every loader there is: name -> (module, class). Modules are imported when asked for.
LOADERS = {
    "folder": ("folder", "FolderLoader"),
    "synthetic": ("synthetic", "SyntheticLoader"),
}


def make_loader(
    name: str, crops: Sequence[CropSpec], *, data: str | os.PathLike[str] | Any | None = None, **options: Any
) -> tuple[Loader, str]:
    """Build a loader by name.

    Args:
        name: a key of LOADERS, or "auto": the fastest one that can read `data` here.
        crops: what to cut out of each image.
        data: folder of images or FolderIndex; not used by "synthetic".
        options: keyword arguments of the loader's class: batch_size, rank, world, seed, in_chans, workers, ...
    Returns:
        The loader, and one line that says which it is and why.
    Raises:
        ValueError: unknown name; no data for a loader that needs it; options out of range.
        DataError: the data cannot be used.
    """
    if name not in ("auto", *LOADERS):
        raise ValueError(f"loader: expected one of auto, {', '.join(LOADERS)}, got {name!r}.")
    if name != "synthetic" and data is None:
        raise ValueError(
            f"data: expected a folder of images for the loader {name!r}, got none; "
            "give one, or choose the loader synthetic."
        )
    reason = f"{name}: as asked for"
    is_auto = name == "auto"
    if is_auto:
        name = "folder"
    module, class_name = LOADERS[name]
    loader_class = getattr(import_module(f".{module}", __name__), class_name)
    loader = loader_class(*(() if name == "synthetic" else (data,)), crops, **options)
    if is_auto:
        reason = f"{name}: {loader.reason}, {parallelism(loader)}"
    return loader, reason


def parallelism(loader: Any) -> str:
    """Who decodes, in words."""
    workers, threads = loader.workers, loader.threads
    if workers:
        return f"{workers} worker processes" + (f" of {threads} threads" if threads > 1 else "")
    return f"{threads} threads ahead of need" if threads else "when a batch is asked for"
