"""`fastmim bench`: starts the benchmarks of the checkout's bench/ folder; and what their results mean to others."""

import os
import subprocess
import sys
from pathlib import Path

from fastmim.config import ConfigError, TrainConfig, nearest

FOLDER = Path(__file__).resolve().parents[1] / "bench"
SCRIPTS = {
    "step": "training steps: ours, official-style eager, the same compiled, other packages",
    "kernels": "every op of fastmim_kernels, against plain torch",
    "loader": "loaders, by CPU time per image",
    "e2e": "whole runs: real images against synthetic ones",
}
USAGE = "fastmim bench SUITE [--json FILE] ...\n\n" + "\n".join(f"  {name:8} {text}" for name, text in SCRIPTS.items())


def bench_command(argv: list[str]) -> int:
    """Runs a suite in a process of its own; returns its exit code.

    Raises:
        ConfigError: unknown suite, or an installation without the bench/ folder.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n\n`fastmim bench SUITE --help` lists the options.")
        return 0
    suite, *rest = argv
    if suite not in SCRIPTS:
        raise ConfigError(
            f"fastmim bench: expected one of {', '.join(SCRIPTS)}, got {suite}{nearest(suite, list(SCRIPTS))}"
        )
    if not FOLDER.is_dir():
        raise ConfigError(f"fastmim bench: expected the folder {FOLDER}, found none; run it from a checkout")
    command, env = _command(suite, rest)
    paths = [str(FOLDER.parent), *(str(FOLDER.parent / name) for name in ("kernels", "pipelines"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])} | env
    return subprocess.run([sys.executable, *command], env=env).returncode


def _command(suite: str, rest: list[str]) -> tuple[list[str], dict[str, str]]:
    """The suite's command line and environment; the ops are timed by pytest, which is told the file in a variable."""
    script = str(FOLDER / f"bench_{suite}.py")
    if suite != "kernels":
        return [script, *rest], {}
    file, rest = _taken(rest, "--json")
    env = {"FASTMIM_BENCH_SHORT": os.environ.get("FASTMIM_BENCH_SHORT", "0")}
    return ["-m", "pytest", script, "-q", "-s", *rest], env if file is None else {**env, "FASTMIM_BENCH_OUT": file}


def _taken(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """A flag's value, and the other arguments."""
    if flag not in argv:
        return None, argv
    at = argv.index(flag)
    if at + 1 == len(argv):
        raise ConfigError(f"{flag}: expected a file, got nothing")
    return str(Path(argv[at + 1]).absolute()), argv[:at] + argv[at + 2 :]


def config_of(record: dict) -> TrainConfig:
    """The configuration of a measured step: the paper preset with the sizes of a record of `fastmim bench step`."""
    from fastmim.arguments import parse_train

    sizes = {name: str(record[name]) for name in ("method", "model", "image_size", "patch_size", "batch_size")}
    flags = [token for name, value in sizes.items() for token in (f"--{name.replace('_', '-')}", value)]
    return parse_train(["--preset", "paper", *flags, "--precision", record["precision"]])
