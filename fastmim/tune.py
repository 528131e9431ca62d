"""`fastmim tune`: tries launch constants of the Triton kernels on this GPU and writes the table of the faster ones."""

import importlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from fastmim_kernels import cases, tuning

from fastmim.config import ConfigError

# A change has to gain this much, in the geometric mean over an op's cases: less is noise.
GAIN = 1.03


def tune(ops: str = "", out: Path | None = None) -> None:
    """Tune the Triton kernels on the current GPU: each constant halved and doubled for as long as that is faster.

    Args:
        ops: Names, separated by commas; empty: every op that has constants.
        out: Folder of the table, for FASTMIM_TUNED. Default: the installed package's own.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "fastmim tune: expected a CUDA device, got none that torch sees; run it on the GPU to tune for."
        )
    gpu = torch.cuda.get_device_name()
    torch.cuda.init()
    constants = tuning.table(gpu)
    names = [name for name in ops.split(",") if name] or list(constants)
    if set(names) - set(constants):
        raise ConfigError(f"--ops: expected some of {', '.join(constants)}, got {ops}")
    for name in names:
        tune_op(name, constants[name])
    defaults = tuning.table("")
    changed = {
        op: own for op in constants
        if (own := {k: v for k, v in constants[op].items() if v != defaults[op][k]})
    }  # fmt: skip
    path = (out or tuning.FOLDER) / tuning.file_name(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__}
    path.write_text(json.dumps({"gpu": gpu, **versions, "constants": changed}, indent=1) + "\n")
    print(f"{path}: {sum(map(len, changed.values()))} constants differ from the defaults")


def tune_op(op: str, constants: dict[str, int]) -> None:
    """Change ``constants`` in place, one after the other: the kernels read them at each launch."""
    device = torch.device("cuda")
    # Large enough that launches do not count, right before and after.
    large = [case for case in cases.load(op)[1] if case.bytes_moved > 1 << 20] or list(cases.load(op)[1])
    best = milliseconds(large, device)
    print(f"{op}: {best:.4f} ms with {constants}", flush=True)
    for name in constants:
        for factor in (2, 0.5):
            for value in doubled(constants[name], factor):
                before, constants[name] = constants[name], value
                try:
                    found = milliseconds(large, device)
                    is_right = all(cases.error(case, device) <= case.tolerance for case in cases.load(op)[0])
                except Exception as e:  # too many registers, too much shared memory: whatever the compiler refuses
                    found, is_right = math.inf, False
                    print(f"  {name} = {value}: {type(e).__name__}")
                if not is_right or found * GAIN > best:
                    constants[name] = before
                    break
                print(f"  {name} = {value}: {found:.4f} ms", flush=True)
                best = found


def doubled(value: int, factor: float) -> Iterator[int]:
    """value * factor, value * factor**2 ... within 1..65536."""
    value = int(value * factor)
    while 1 <= value <= 65536:
        yield value
        value = int(value * factor)


def milliseconds(tried: list[cases.Case], device: torch.device) -> float:
    """Geometric mean of the cases' times, forward and backward."""
    from triton.testing import do_bench

    times = []
    for case in tried:
        inputs = case.inputs(device)
        function = cases.public(case)
        times.append(do_bench(lambda f=function, c=case, i=inputs: cases.call(f, c, i), rep=50, return_mode="median"))
    return statistics.geometric_mean(times)
