"""`fastmim bench`: starts the benchmarks of the checkout's bench/ folder; and what their results mean to others."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
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

KERNELS_USAGE = """usage: fastmim bench kernels [--json FILE] [-k WORDS] [other options of pytest]

Every op of fastmim_kernels, against plain torch.

  --json FILE  where the lines go; what is in it is not run again. Without it: a new folder of runs/
  -k WORDS     only cases whose names match, such as -k "masked_pixel_loss and bfloat16"

Environment variables (default):
  FASTMIM_BENCH_SHORT=1          one small size per op, 5 rounds, no torch.compile (0)
  FASTMIM_BENCH_CALLS=N          rounds per case (20; 5 if short)
  FASTMIM_BENCH_COMPILE_OPS=0    leaves torch.compile out, which takes most of the time (1; 0 if short)
  FASTMIM_BENCH_OUT=FILE         the same as --json
  FASTMIM_BENCH_RESULTS=FOLDER   in place of the new folder
  OMP_NUM_THREADS=N              threads (one per core)"""


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
    if suite == "kernels" and {"-h", "--help"} & set(rest):
        print(KERNELS_USAGE)
        return 0
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
    """A flag's file, and the other arguments."""
    for at, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag:
            after = argv[at + 1 :]
            if not equals and after and not after[0].startswith("-"):
                value, *after = after
            if not value:
                raise ConfigError(f"{flag}: expected a file, got nothing")
            return str(results_file(value).absolute()), argv[:at] + after
    return None, argv


# ---- the scripts' command lines


class Parser(argparse.ArgumentParser):
    """One that says a mistake in one line."""

    def error(self, message: str):
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def results_file(text: str) -> Path:
    """Where lines of results can go.

    Raises:
        ConfigError: it is a folder, or has the name of the tables or the picture that are written beside it.
    """
    path = Path(text)
    if path.is_dir() or path.suffix in (".md", ".png"):
        found = "a folder" if path.is_dir() else f"one of {path.suffix}"
        raise ConfigError(f"--json: expected a file of lines of JSON, got {found}, {text}; name it NAME.jsonl")
    return path


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return integer


def exit_code(main: Callable[[], int | None]) -> int:
    """Of a script's main function; a mistake of its user's is one line, as in cli.py."""
    try:
        return main() or 0
    except Exception as e:
        if not hasattr(e, "exit_code"):
            raise
        print(f"error: {e}", file=sys.stderr, flush=True)
        return e.exit_code


def config_of(record: dict) -> TrainConfig:
    """The configuration of a measured step: the paper preset with the sizes of a record of `fastmim bench step`."""
    from fastmim.arguments import parse_train

    sizes = {name: str(record[name]) for name in ("method", "model", "image_size", "patch_size", "batch_size")}
    flags = [token for name, value in sizes.items() for token in (f"--{name.replace('_', '-')}", value)]
    return parse_train(["--preset", "paper", *flags, "--precision", record["precision"]])
