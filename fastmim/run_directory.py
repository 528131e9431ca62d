"""The folder of a run: claimed by one process at a time, holding config, metrics, checkpoints and pictures."""

import fcntl
import os
import socket
import time
from pathlib import Path

import yaml

from fastmim.config import ConfigError, TrainConfig, to_plain

CONFIG_FILE, CHECKPOINTS, LOCK_FILE = "config.yaml", "checkpoints", ".lock"
RUNS = Path("runs")


def default_out(method: str) -> Path:
    return RUNS / f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_run(method: str) -> Path | None:
    """The run of this method under runs/ that was started last."""
    runs = [p for p in RUNS.glob(f"{method}-*") if (p / CONFIG_FILE).is_file()]
    return max(runs, key=lambda p: (p.stat().st_mtime, p.name), default=None)


class RunDirectory:
    """Creates and claims the folder.

    Raises:
        ConfigError: if another process holds it, or if it holds a run and this one does not resume.
    """

    def __init__(self, path: Path, *, resuming: bool):
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out: expected a folder, got the file {path}")
        if (path / CONFIG_FILE).exists() and not resuming:
            raise ConfigError(f"--out: {path} already holds a run; add --resume to continue it, or name another folder")
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The kernel frees the lock when its holder dies, so no lock is ever stale.
        self.lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(self.lock, 200, 0).decode(errors="replace").strip()
            os.close(self.lock)
            raise ConfigError(f"--out: {path} is in use by {holder}; wait for it, or name another folder") from e
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def write_config(self, config: TrainConfig) -> None:
        temporary = self.path / f"{CONFIG_FILE}.tmp"
        temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
        os.replace(temporary, self.path / CONFIG_FILE)

    def close(self) -> None:
        os.close(self.lock)
