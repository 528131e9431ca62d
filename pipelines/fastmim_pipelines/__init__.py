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
# The first four read what their names say; dali and nvimgcodec decode what any of the four reads.
LOADERS = {
    "folder": ("folder", "FolderLoader"),
    "tar": ("tar", "TarLoader"),
    "ffcv": ("ffcv_file", "BetonLoader"),
    "hf": ("hf", "HfLoader"),
    "dali": ("dali", "DaliLoader"),
    "nvimgcodec": ("nvimgcodec", "NvimgcodecLoader"),
    "synthetic": ("synthetic", "SyntheticLoader"),
}
_DECODERS = ("dali", "nvimgcodec")


def make_loader(
    name: str, crops: Sequence[CropSpec], *, data: str | os.PathLike[str] | Any | None = None, **options: Any
) -> tuple[Loader, str]:
    """Build a loader by name.

    Args:
        name: a key of LOADERS, or "auto": the fastest one that can read `data` here.
        crops: what to cut out of each image.
        data: a folder of images, a folder with tar shards or one, a .beton file, or an index of such (see
            index.open_index); not used by "synthetic".
        options: keyword arguments of the loader's class: batch_size, rank, world, seed, in_chans, workers, ...
    Returns:
        The loader, and one line that says which it is and why.
    Raises:
        ValueError: unknown name; no data for a loader that needs it, or an index for another; options out of range.
        ModuleNotFoundError: the loader needs a package that is not installed; the message has the command.
        DataError: the data cannot be used.
    """
    if name not in ("auto", *LOADERS):
        raise ValueError(f"loader: expected one of auto, {', '.join(LOADERS)}, got {name!r}.")
    if name != "synthetic" and data is None:
        raise ValueError(
            f"data: expected a folder of images for the loader {name!r}, got none; "
            "give one, or choose the loader synthetic."
        )
    if name == "synthetic":
        return _class_of(name)(crops, **options), "synthetic: as asked for"
    from .index import open_index

    decodes = name in _DECODERS
    index = open_index(data, "auto" if decodes else name) if isinstance(data, str | os.PathLike) else data
    if not decodes and name not in ("auto", index.kind):
        raise ValueError(f"loader: expected {index.kind} for {index.root}, got {name!r}; choose auto.")
    chosen = name if decodes else index.kind
    loader = _class_of(chosen)(index, crops, **options)
    asked = ", as asked for" if name != "auto" else ""
    return loader, f"{chosen}{asked}: {loader.reason}, {parallelism(loader)}"


def _class_of(name: str) -> type:
    module, class_name = LOADERS[name]
    return getattr(import_module(f".{module}", __name__), class_name)


def parallelism(loader: Any) -> str:
    """Who decodes, in words."""
    workers, threads = loader.workers, loader.threads
    if workers:
        text = f"{workers} worker process{'es' * (workers > 1)}"
        return f"{text} of {threads} threads" if threads > 1 else text
    return f"{threads} thread{'s' * (threads > 1)} ahead of need" if threads else "when a batch is asked for"
