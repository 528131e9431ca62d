"""The folder of a run: claimed by one process at a time, holding config, metrics, checkpoints and pictures."""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import yaml

from fastmim.config import ConfigError, TrainConfig, to_plain
from fastmim.saving import StorageError

CONFIG_FILE, CHECKPOINTS, LOCK_FILE = "config.yaml", "checkpoints", ".lock"
# Under runs/: "NUMBER NAME", what number of run it is, and how its folder was called then.
NUMBER_FILE = ".number"
RUNS = Path("runs")
# How long a lock may outlive the process that took it. Source: data workers look for their parent every second.
ORPHANS_SECONDS = 30


def new_run(method: str) -> Path:
    """Makes a folder under runs/ that no other run has, not even one that starts in the same second."""
    name = f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for n in count(1):
        path = RUNS / (name if n == 1 else f"{name}-{n}")
        with _writing(path):
            try:
                path.mkdir(parents=True, mode=0o700)
            except FileExistsError:
                continue
            return path


def newest_run(method: str | None) -> Path | None:
    """The run under runs/ that was started last; with a method, the last of that one's.

    By the number that it gave itself: times are wrong after a clock was set, and in copied folders. A copy has the
    number of its original, and comes after it.
    """
    runs = [p for p in RUNS.glob(f"{method or '*'}-*") if (p / CONFIG_FILE).is_file()]
    numbers = {run: _number(run) for run in runs}
    return max(
        runs, key=lambda run: (numbers[run][0], numbers[run][1] == run.name, run.name.partition("-")[2]), default=None
    )


def _number(run: Path) -> tuple[int, str]:
    """A run's number, and the name that its folder had then; 0 if it has none."""
    try:
        number, _, name = (run / NUMBER_FILE).read_text().strip().partition(" ")
        return int(number), name
    except (OSError, ValueError):
        return 0, ""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StorageError(
            f"--out: expected a folder that can be written, got {path} ({e.strerror}); make room there, or name another"
        ) from e


class RunDirectory:
    """Creates and claims the folder.

    Raises:
        ConfigError: if another process holds it, or if it holds a run and this one does not resume.
        StorageError: if it cannot be written.
    """

    def __init__(self, path: Path, *, resuming: bool):
        self.path = path
        with _writing(path):
            if path.exists() and not path.is_dir():
                raise ConfigError(f"--out: expected a folder, got the file {path}")
            self._check_free(resuming)
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            # The kernel frees the lock when its holder dies, so no lock is ever stale.
            self.lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                self._claim()
                # Again: a run that began a moment ago may have had it, and ended.
                self._check_free(resuming)
                os.ftruncate(self.lock, 0)
                os.pwrite(self.lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            except BaseException:
                os.close(self.lock)
                raise

    def _check_free(self, resuming: bool) -> None:
        if not resuming and (self.path / CONFIG_FILE).exists():
            raise ConfigError(
                f"--out: {self.path} already holds a run; add --resume to continue it, or name another folder"
            )

    def _claim(self) -> None:
        end = time.monotonic() + ORPHANS_SECONDS
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as e:
                holder = os.pread(self.lock, 200, 0).decode(errors="replace").strip()
                # A killed run's data workers have the lock, too, and take a second to notice. One that began just now
                # has not said who it is.
                if (holder and not _is_dead(holder)) or time.monotonic() > end:
                    raise ConfigError(
                        f"--out: {self.path} is in use by {holder or 'another process'}; wait for it, or name another folder"
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
        with _writing(self.path):
            self._take_number()
            temporary = self.path / f"{CONFIG_FILE}.tmp"
            temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
            os.replace(temporary, self.path / CONFIG_FILE)

    def _take_number(self) -> None:
        """The next one, where runs have numbers; a copy that is continued has become a run of its own."""
        siblings, name = self.path.resolve().parent, self.path.resolve().name
        if siblings == RUNS.resolve() and _number(self.path)[1] != name:
            number = 1 + max(_number(run)[0] for run in siblings.iterdir())
            (self.path / NUMBER_FILE).write_text(f"{number} {name}\n")

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
