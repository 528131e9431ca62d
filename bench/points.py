"""Files of results: one line of JSON per measured point, written the moment it is measured.

A run that is killed and started again with the same file goes on where it stopped: what the file has is not measured
again. To measure anew, take another file.
"""

import json
import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from pathlib import Path

from fastmim.config import ConfigError


class Points:
    """Records of a file, or of nothing but this process.

    Args:
        path: the file; None: records are kept in memory alone.

    Raises:
        ConfigError: the file holds something else, which is left as it is.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[dict] = []
        if path is not None and path.exists():
            try:
                *whole, last = path.read_text().split("\n")
            except ValueError as e:
                raise ConfigError(f"{path}: expected lines of JSON, got no text; take another file") from e
            self.records = [_record(line, path, i) for i, line in enumerate(whole, 1)]
            if last and not last.startswith("{"):
                raise ConfigError(f"{path}: expected lines of JSON, its last line is none; take another file")
            if last:
                # The process that wrote it was killed in the middle of a line, or just before its end.
                with suppress(ValueError):
                    self.records.append(json.loads(last))
                    whole.append(last)
                path.write_text("".join(f"{line}\n" for line in whole))

    def add(self, records: Iterable[dict]) -> None:
        """Appends records, all in one write, and waits for the disk."""
        new = list(records)
        self.records += new
        if self.path is not None and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in new))
                file.flush()
                os.fsync(file.fileno())

    def has(self, key: Callable[[dict], Hashable], value: Hashable) -> bool:
        """Whether there is a record with that key."""
        return any(key(record) == value for record in self.records)


def _record(line: str, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected lines of JSON, line {number} is none; take another file")
    return record


def latest(records: Iterable[dict], key: Callable[[dict], Hashable]) -> list[dict]:
    """The last record of each key, in the order in which the keys came first."""
    found: dict[Hashable, dict] = {}
    for record in records:
        found[key(record)] = record
    return list(found.values())


# Of a record, as a reader wants to see them.
ORIGIN = (("device", "{}"), ("threads", "{} thread(s)"), ("backend", "{} kernels"), ("processes", "processes: {}"), ("torch", "torch {}"), ("triton", "Triton {}"), ("python", "Python {}"),
          ("commit", "commit {}"))  # fmt: skip


def origin(records: list[dict]) -> str:
    """Where records come from: device, versions, commits, n; what they do not say is left out."""
    parts = []
    for key, form in ORIGIN:
        values = dict.fromkeys(str(r[key]) for r in records if key in r)
        parts += [form.format(", ".join(values))] * bool(values)
    rounds = [r["n"] for r in records if "n" in r]
    if rounds:
        parts.append(f"n = {min(rounds)}" + f" to {max(rounds)}" * (max(rounds) > min(rounds)))
    return "; ".join(parts)
