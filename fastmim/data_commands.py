"""`fastmim demo-data`, `pack` and `verify-data`: images to try, in fewer files, and whether all can be read."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from fastmim_pipelines.demo import write_demo
from fastmim_pipelines.index import open_index
from fastmim_pipelines.pack import pack as write_packed
from fastmim_pipelines.verify import verify

from fastmim.config import ConfigError

BAD_DATA = 4

Data = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
Out = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]


def demo_data(out: Out, images: int = 3000, val_images: int = 600, seed: int = 0) -> None:
    """Write the demo data set: JPEG files in train/<class>/ and val/<class>/.

    Args:
        out: Folder to write; a finished set of the same parameters is kept.
        images: Training images.
        val_images: Validation images.
        seed: The same seed gives the same bytes.
    """
    try:
        write_demo(out, images=images, val_images=val_images, seed=seed, progress=print)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def pack(
    data: Data,
    out: Out,
    to: Literal["tar", "beton"],
    resize: str | None = None,
    quality: int | None = None,
    in_chans: int = 3,
    workers: int | None = None,
) -> None:
    """Write images into a folder of tar shards, or into one .beton file; --data takes either.

    Args:
        data: Folder of images, tar shards or a .beton file.
        out: New folder (tar) or new file (beton).
        to: Format.
        resize: max:500 makes the longer side at most 500 pixels, short:256 the shorter one. Default: bytes are kept.
        quality: Of the JPEG files if they are written anew.
        in_chans: Channels; any number of them into tar as they are, 1 or 3 with --resize or into beton.
        workers: Processes. Default: one per core.
    """
    try:
        with _progress("packed") as telling:
            packed = write_packed(
                open_index(data), out, to=to, resize=_resize(resize), quality=quality, in_chans=in_chans, workers=workers,
                **telling,
            )  # fmt: skip
    except ValueError as e:
        raise ConfigError(str(e)) from e
    print(
        f"{packed.images} images, {packed.bytes / 2**20:.1f} MiB in {len(packed.files)} files; {len(packed.bad)} left out"
    )


@contextmanager
def _progress(done: str) -> Iterator[dict[str, Any]]:
    """How to tell of progress: a bar on a terminal, lines now and then elsewhere."""
    if not sys.stdout.isatty():
        yield {}
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(BarColumn(40), MofNCompleteColumn(), TextColumn(f"images {done}"), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        yield {
            "progress": lambda line: bar.console.print(line, highlight=False, markup=False, soft_wrap=True),
            "advance": lambda number, total: bar.update(task, completed=number, total=total),
        }


def _resize(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    kind, _, size = text.partition(":")
    if kind not in ("max", "short") or not size.isdigit():
        raise ConfigError(f"--resize: expected max:PIXELS or short:PIXELS, got {text}")
    return kind, int(size)


def verify_data(data: Data, write_list: Path | None = None, in_chans: int = 3, workers: int | None = None) -> int:
    """Decode every image whole and name the bad ones; exit code 4 if there are any.

    Args:
        data: Folder of images, tar shards or a .beton file.
        write_list: Write the names of the bad images to this file, for `fastmim train --exclude`.
        in_chans: Channels that training will ask for.
        workers: Processes. Default: one per core.
    """
    with _progress("read") as telling:
        found = verify(open_index(data), in_chans=in_chans, list_path=write_list, workers=workers, **telling)
    print(f"{found.images} images read, {len(found.bad)} bad, {len(found.damage)} damaged files of many images")
    return BAD_DATA if found.bad or found.damage else 0
