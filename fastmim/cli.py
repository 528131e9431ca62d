"""Commands: argv -> config -> action. Prints what runs, and why; turns errors into one line and an exit code."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastmim.config import ConfigError, nearest

USAGE = """fastmim COMMAND ...

  train          pre-train an encoder (also: deepspeed | torchrun | python fastmim/train.py)
  knn            k-NN accuracy of a checkpoint or of an exported encoder
  linear         linear probe of the same
  record-tokens  write the tokens that CAE predicts, for runs that repeat the same crops
  pack           write a folder of images into tar shards or a .beton file
  verify-data    decode every image whole and name the bad ones
  doctor         speed of disk, decoder, loader and step on this data; names the bottleneck
  replay         take a skipped, non-finite step again and show where it begins
  zero-import    weights out of a checkpoint that DeepSpeed wrote, as safetensors
  demo-data      write the demo data set: labeled, photo-like JPEG files
  plan           parameters, memory, speed, communication and hours of a run, before it runs
  bench          images per second of training steps, beside other ways to take them
  tune           launch constants of the Triton kernels for this GPU
  info           versions, devices, kernels, loaders

`fastmim COMMAND --help` lists the options."""

# How long another rank that failed leaves rank 0 to say why.
GRACE_SECONDS = 5
# Exit codes: 0 done, 2 usage, 3 no valid checkpoint, 4 bad data, 5 non-finite, 6 storage, 7 another process gone, 75
# saved on a signal. Errors carry theirs as `exit_code`.
USAGE_ERROR, NO_CHECKPOINT, STORAGE_ERROR, PEER_GONE, SAVED_ON_SIGNAL = 2, 3, 6, 7, 75


def run(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train, "knn": _knn, "linear": _linear, "record-tokens": _record_tokens, "pack": _pack,
        "verify-data": _verify_data, "doctor": _doctor, "replay": _replay, "zero-import": _zero_import, "demo-data": _demo_data, "plan": _plan, "bench": _bench, "tune": _tune, "info": _info,
    }  # fmt: skip
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in commands:
        return _fail(ConfigError(f"fastmim: expected a command ({', '.join(commands)}), got {argv[0]}"
                                 f"{nearest(argv[0], list(commands))}"), USAGE_ERROR)  # fmt: skip
    try:
        if os.environ.get("FASTMIM_FAULT"):
            from fastmim.testing import faults

            faults.install(os.environ["FASTMIM_FAULT"])
        return commands[argv[0]](argv[1:])
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


def _train(argv: list[str]) -> int:
    from fastmim.arguments import parse_train
    from fastmim.dist import peers_reported
    from fastmim.session import Session

    with peers_reported():
        return 0 if Session(parse_train(argv)).run() else SAVED_ON_SIGNAL


def _knn(argv: list[str]) -> int:
    from fastmim.evaluate.command import knn

    knn(argv)
    return 0


def _linear(argv: list[str]) -> int:
    from fastmim.evaluate.command import linear

    linear(argv)
    return 0


def _record_tokens(argv: list[str]) -> int:
    from fastmim.arguments import parse_train
    from fastmim.session import Session

    folder, steps, argv = _recording(argv)
    Session(parse_train(argv)).record_tokens(folder, steps)
    return 0


def _recording(argv: list[str]) -> tuple[Path, range, list[str]]:
    """The command's own flags, and those of the run it records for."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="fastmim record-tokens",
        epilog="All other flags are those of `fastmim train`, and must be the later run's.",
    )
    parser.add_argument("--write", type=Path, required=True, metavar="DIR", help="folder of the recording")
    parser.add_argument("--first", type=int, default=0, metavar="STEP", help="first step to record (default 0)")
    parser.add_argument("--last", type=int, required=True, metavar="STEP", help="last step to record")
    own, rest = parser.parse_known_args(argv)
    return own.write, range(own.first, own.last + 1), rest


def _pack(argv: list[str]) -> int:
    import tyro

    from fastmim.data_commands import pack

    tyro.cli(pack, prog="fastmim pack", args=argv)
    return 0


def _verify_data(argv: list[str]) -> int:
    import tyro

    from fastmim.data_commands import verify_data

    tyro.cli(verify_data, prog="fastmim verify-data", args=argv)
    return 0


def _doctor(argv: list[str]) -> int:
    from fastmim.doctor import doctor

    doctor(argv)
    return 0


def _replay(argv: list[str]) -> int:
    import tyro

    from fastmim.replay import replay

    return tyro.cli(replay, prog="fastmim replay", args=argv)


def _zero_import(argv: list[str]) -> int:
    import tyro

    from fastmim.zero_import import zero_import

    tyro.cli(zero_import, prog="fastmim zero-import", args=argv)
    return 0


def _tune(argv: list[str]) -> int:
    import tyro

    from fastmim.tune import tune

    tyro.cli(tune, prog="fastmim tune", args=argv)
    return 0


def _demo_data(argv: list[str]) -> int:
    import tyro
    from fastmim_pipelines.demo import write_demo

    def demo_data(folder: tyro.conf.Positional[Path], images: int = 3000, val_images: int = 600, seed: int = 0) -> None:
        """Write the demo data set: JPEG files in train/<class>/ and val/<class>/.

        Args:
            folder: where to; a finished set of the same parameters is kept.
            images: training images.
            val_images: validation images.
            seed: the same seed gives the same bytes.
        """
        try:
            write_demo(folder, images=images, val_images=val_images, seed=seed, progress=print)
        except ValueError as e:
            raise ConfigError(str(e)) from e

    tyro.cli(demo_data, prog="fastmim demo-data", args=argv)
    return 0


def _plan(argv: list[str]) -> int:
    from fastmim.plan import plan_command

    plan_command(argv)
    return 0


def _bench(argv: list[str]) -> int:
    from fastmim.bench import bench_command

    return bench_command(argv)


def _info(argv: list[str]) -> int:
    import tyro

    from fastmim.info import info

    tyro.cli(info, prog="fastmim info", args=argv)
    return 0
