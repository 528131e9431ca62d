"""Commands: argv -> config -> action. Prints what runs, and why; turns errors into one line and an exit code."""

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from fastmim.config import ConfigError, nearest

USAGE = """fastmim COMMAND ...

  train          pre-train an encoder (also: deepspeed | torchrun | python fastmim/train.py)
  knn            measure the k-NN accuracy of a checkpoint or of an exported encoder
  linear         measure the accuracy of a linear probe of the same
  record-tokens  write the tokens that CAE predicts, for runs that repeat the same crops
  pack           write a folder of images into tar shards or a .beton file
  verify-data    decode every image whole and name the bad ones
  doctor         measure disk, decoder, loader and step on this data, and name what is slow
  replay         take a skipped, non-finite step again and show where it begins
  zero-import    write the weights of a checkpoint of DeepSpeed's as safetensors
  demo-data      write the demo data set: labeled, photo-like JPEG files
  plan           compute memory, speed, communication and hours of a run, before it runs
  bench          training steps, kernels, loaders and whole runs, beside other ways to do the same
  tune           find the launch constants of the Triton kernels for this GPU
  info           print versions, devices, kernels and loaders

`fastmim COMMAND --help` lists the options."""

# How long another rank that failed leaves rank 0 to say why.
GRACE_SECONDS = 5
# Exit codes: 0 done, 2 usage, 3 no valid checkpoint, 4 bad data, 5 non-finite, 6 storage, 7 another process gone, 75
# saved on a signal. Errors carry theirs as `exit_code`.
USAGE_ERROR, NO_CHECKPOINT, STORAGE_ERROR, PEER_GONE, SAVED_ON_SIGNAL = 2, 3, 6, 7, 75


# Where each is. They are imported when called for: torch alone takes seconds.
COMMANDS = {
    "train": "cli:train", "knn": "evaluate.command:knn", "linear": "evaluate.command:linear",
    "record-tokens": "cli:record_tokens", "pack": "data_commands:pack", "verify-data": "data_commands:verify_data",
    "doctor": "doctor:doctor", "replay": "replay:replay", "zero-import": "zero_import:zero_import",
    "demo-data": "data_commands:demo_data", "plan": "plan:plan_command", "bench": "bench:bench_command", "tune": "tune:tune",
    "info": "info:info",
}  # fmt: skip
# Functions of argv; the parameters of the others are their options.
PARSERS = {"train", "knn", "linear", "record-tokens", "doctor", "plan", "bench"}


def run(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in COMMANDS:
        return _fail(ConfigError(f"fastmim: expected a command ({', '.join(COMMANDS)}), got {argv[0]}"
                                 f"{nearest(argv[0], list(COMMANDS))}"), USAGE_ERROR)  # fmt: skip
    try:
        if os.environ.get("FASTMIM_FAULT"):
            from fastmim.testing import faults

            faults.install(os.environ["FASTMIM_FAULT"])
        return _command(argv[0])(argv[1:]) or 0
    except OSError as e:
        return _fail(e, STORAGE_ERROR)
    except Exception as e:
        # Errors that a user can cause say how the process shall end; anything else is a defect, with its traceback.
        if not hasattr(e, "exit_code"):
            raise
        return _fail(e, e.exit_code)


def _fail(error: Exception, code: int) -> int:
    # Every rank meets the same mistake; one of them says it.
    if os.environ.get("RANK", "0") == "0" or code not in (USAGE_ERROR, NO_CHECKPOINT):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Other ranks may wait for this one in a collective: leave without the farewell that would wait, too. But not
        # before rank 0 has spoken: a launcher ends all processes with the first one.
        sys.stdout.flush()
        if os.environ.get("RANK", "0") != "0" and code != PEER_GONE:
            time.sleep(GRACE_SECONDS)
        os._exit(code)
    return code


def _command(name: str) -> Callable[[list[str]], int | None]:
    module, _, function = COMMANDS[name].partition(":")
    action = getattr(import_module(f"fastmim.{module}"), function)
    if name in PARSERS:
        return action
    from fastmim.usage import call

    return lambda argv: call(action, f"fastmim {name}", argv)


def train(argv: list[str]) -> int:
    """`fastmim train`; returns the exit code."""
    from fastmim.agreement import agreed, from_rank_0
    from fastmim.arguments import parse_train
    from fastmim.dist import peers_reported
    from fastmim.session import Session

    with peers_reported():
        return 0 if agreed(lambda: Session(parse_train(argv, from_rank_0))).run() else SAVED_ON_SIGNAL


def record_tokens(argv: list[str]) -> None:
    """`fastmim record-tokens`."""
    from fastmim.arguments import parse_train
    from fastmim.session import Session

    folder, steps, argv = _recording(argv)
    Session(parse_train(argv)).record_tokens(folder, steps)


def _recording(argv: list[str]) -> tuple[Path, range, list[str]]:
    """The command's own flags, and those of the run it records for."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="fastmim record-tokens",
        description="Write the tokens that CAE predicts, for runs that repeat the same crops.",
        epilog="All other flags are those of `fastmim train`, and must be the later run's.",
    )
    parser.add_argument("--write", type=Path, required=True, metavar="DIR", help="Folder of the recording.")
    parser.add_argument("--first", type=int, default=0, metavar="STEP", help="First step to record. (default: 0)")
    parser.add_argument("--last", type=int, required=True, metavar="STEP", help="Last step to record.")
    own, rest = parser.parse_known_args(argv)
    return own.write, range(own.first, own.last + 1), rest
