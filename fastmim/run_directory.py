"""The folder of a run: claimed by one process at a time, holding config, metrics, checkpoints and pictures."""

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

import yaml

from fastmim.config import ConfigError, TrainConfig, to_plain

CONFIG_FILE, CHECKPOINTS, LOCK_FILE = "config.yaml", "checkpoints", ".lock"
RUNS = Path("runs")
# How long a lock may outlive the process that took it. Source: data workers look for their parent every second.
ORPHANS_SECONDS = 30


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
            self._claim()
        except BaseException:
            os.close(self.lock)
            raise
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _claim(self) -> None:
        end = time.monotonic() + ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as e:
                holder = os.pread(self.lock, 200, 0).decode(errors="replace").strip()
                # A killed run's data workers have the lock, too, and take a second to notice.
                if not _is_dead(holder) or time.monotonic() > end:
                    raise ConfigError(
                        f"--out: {self.path} is in use by {holder}; wait for it, or name another folder"
                    ) from e
                time.sleep(0.1)
            except OSError as e:
                if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                # A network file system without locks: what is written there must do.
                holder = os.pread(self.lock, 200, 0).decode(errors="replace").strip()
                if holder and not _is_dead(holder):
                    raise ConfigError(
                        f"--out: {self.path} may be in use by {holder}; if it is not, delete {self.path / LOCK_FILE}"
                    ) from e
                return

    def write_config(self, config: TrainConfig) -> None:
        temporary = self.path / f"{CONFIG_FILE}.tmp"
        temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
        os.replace(temporary, self.path / CONFIG_FILE)

    def close(self) -> None:
        # Empty, so that a file system without locks can tell a finished run from a living one.
        os.ftruncate(self.lock, 0)
        os.close(self.lock)


def _is_dead(holder: str) -> bool:
    """Whether "process N on HOST" is of this host and gone."""
    match = re.fullmatch(r"process (\d+) on (.+)", holder)
    if match is None or match[2] != socket.gethostname() or not Path("/proc/self").exists():
        return False
    try:
        os.kill(int(match[1]), 0)
        # Ended, but its parent has not asked how.
        return Path(f"/proc/{match[1]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:
        return False
