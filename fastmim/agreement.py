"""All processes of a run have one configuration: settled before the first collective, where a difference is a hang.

Hosts may start with different command lines, and a run's folder, which only rank 0 reads, may be on its host alone.
"""

import dataclasses
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastmim_pipelines.index import ImageIndex

from fastmim import dist
from fastmim.config import ConfigError, TrainConfig, to_plain

# Fields that may differ from host to host, beside the places of files.
LOCAL = ("out", "workers")
# Of the images: all names of ImageNet would take seconds.
NAMES_COMPARED = 1000


class Made(Protocol):
    """What a process has made of its command line."""

    config: TrainConfig
    choice: tuple
    """Of the engine; depends on the memory of the host's devices."""
    train_index: ImageIndex | None


Session = TypeVar("Session", bound=Made)


def from_rank_0(words: list[str]) -> list[str]:
    """Rank 0's words on every rank."""
    return json.loads(dist.from_rank_0("words", json.dumps(words)))


def agreed(make: Callable[[], Session]) -> Session:
    """What `make` gives, once it is clear that it gives the same on every rank.

    Args:
        make: may call `from_rank_0` once.

    Raises:
        ConfigError: on every rank, if any raised an error with an exit code, or if the configurations differ.
    """
    made = None
    try:
        made = make()
        derived = {"the engine chosen": str(made.choice[:3]), "the images found": images(made.train_index)}
        text = {"config": dict(_comparable(made.config)) | derived}
    except Exception as e:
        if dist.launched_world() == 1 or not hasattr(e, "exit_code"):
            raise
        from_rank_0([])  # somebody may wait for it
        text = {"problem": str(e), "code": e.exit_code, "host": socket.gethostname()}
    verdict = dist.judged_by_rank_0("configuration", json.dumps(text), judge)
    if verdict:
        problem = json.loads(verdict)
        error = ConfigError(problem["problem"])
        error.exit_code = problem["code"]
        raise error
    return made


def _comparable(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all fields that must be the same everywhere."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _comparable(value, f"{options.method if field.name == 'options' else prefix + field.name}.")
        elif field.name not in LOCAL:
            yield f"--{prefix}{field.name}".replace("_", "-"), "a path" if isinstance(value, Path) else to_plain(value)


def fingerprint(index: ImageIndex | None) -> list[int] | None:
    """How many there are, and a checksum of some of their names: one that is missing shifts all that follow."""
    if index is None:
        return None
    names = [index.name(i) for i in range(0, len(index), max(1, len(index) // NAMES_COMPARED))]
    return [len(index), zlib.crc32(chr(0).join(names).encode(errors="surrogateescape"))]


def images(index: ImageIndex | None) -> str:
    """Their fingerprint for people."""
    found = fingerprint(index)
    return "none" if found is None else f"{found[0]} (names {found[1]:08x})"


def judge(texts: list[str]) -> str:
    """The problem and its exit code as JSON, or "", from what `agreed` has written on each rank."""
    first, *others = ranks = [json.loads(text) for text in texts]
    for rank, each in enumerate(ranks):
        if "problem" in each:
            where = f"rank {rank} on {each['host']}: " if rank else ""
            return json.dumps({"problem": where + each["problem"], "code": each["code"]})
    for rank, other in enumerate(others, 1):
        for name in first["config"] | other["config"]:
            expected, got = (each["config"].get(name) for each in (first, other))
            if expected != got:
                problem = (
                    f"{name}: expected {expected} on rank {rank}, as on rank 0, got {got}; start all processes with the "
                    f"same options and images"
                )
                return json.dumps({"problem": problem, "code": ConfigError.exit_code})
    return ""
