"""The script door: what `deepspeed`, `torchrun` and `python` start. `fastmim train` is the same command."""

import os
import sys

# A launcher puts this file's own folder first: a module in it could then shadow one of the standard library.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != HERE]

try:
    import fastmim
except ModuleNotFoundError:
    sys.exit(
        f"fastmim is not installed in {sys.executable}: run `make setup`, or `pip install -e {os.path.dirname(HERE)}`"
    )

if os.path.realpath(os.path.dirname(fastmim.__file__)) != os.path.realpath(HERE):
    print(
        f"error: {HERE} was started, but the installed fastmim is {os.path.dirname(fastmim.__file__)}; "
        f"install this one (`pip install -e {os.path.dirname(HERE)}`) or start that one",
        file=sys.stderr,
    )
    sys.exit(2)

from fastmim.boot import prepare_process  # noqa: E402

if __name__ == "__main__":
    prepare_process()
    from fastmim.cli import run

    sys.exit(run(["train", *sys.argv[1:]]))
