"""The machine that is measured: its device, its clock, its ceilings, and what a record says of it."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from points import Points

from fastmim.device import cpu_capability, default_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"


def clock() -> float:
    """Seconds: of the wall where a GPU computes, of this process's threads where the CPU does, which other programs
    disturb less."""
    if IS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def seconds_of(action: Callable[[], object], times: int) -> float:
    """Of the fastest call."""
    found = []
    for _ in range(times):
        began = clock()
        action()
        found.append(clock() - began)
    return min(found)


def ceilings() -> dict:
    """What the machine can do, measured now: products in bf16 (fp32 where there is none), copies."""
    side, size, times = (8192, 2**31, 20) if IS_GPU else (1536, 2**27, 4)
    dtype = torch.bfloat16 if default_precision(DEVICE)[0] == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    seconds_of(lambda: (a @ b, target.copy_(source)), 2)
    a32, b32 = a.float(), b.float()
    return {
        "suite": "ceiling", **machine(), **_sensors(),
        "matmul_tflops": 2 * side**3 / seconds_of(lambda: a @ b, times) / 1e12,
        "matmul_fp32_tflops": 2 * side**3 / seconds_of(lambda: a32 @ b32, times) / 1e12,
        "copy_gb_s": 2 * size / seconds_of(lambda: target.copy_(source), times) / 1e9,
    }  # fmt: skip


CEILINGS = ("matmul_tflops", "copy_gb_s")


@contextmanager
def between_ceilings(points: Points) -> Iterator[dict]:
    """Adds the ceilings before and after what is measured inside, the latter with their `drift`: the largest relative
    change. What is yielded are the former."""
    first = ceilings()
    points.add([first])
    yield first
    last = ceilings()
    drift = max(abs(last[name] / first[name] - 1) for name in CEILINGS)
    points.add([last | {"drift": drift}])
    for name in CEILINGS:
        print(f"  {name}: {first[name]:.3g} first, {last[name]:.3g} last")


def machine() -> dict:
    """Device, threads, versions, and the checkout that is measured."""
    name = torch.cuda.get_device_name() if IS_GPU else f"{platform.machine()} {cpu_capability()}"
    return {"device": name, "device_type": DEVICE.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), **_triton(), "commit": commit()}  # fmt: skip


@cache
def commit() -> str:
    """Of the checkout when it was first asked for, "+" where it differs from that commit. Of a copy without its history
    FASTMIM_COMMIT tells it, else it is unknown."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or os.environ.get("FASTMIM_COMMIT", "unknown")


@cache
def _triton() -> dict:
    try:
        return {"triton": metadata.version("triton")} if IS_GPU else {}
    except metadata.PackageNotFoundError:
        return {}


SENSORS = ("clocks.sm", "power.draw", "temperature.gpu")


def _sensors() -> dict:
    """Clock in MHz, power in W and temperature of the GPU, where nvidia-smi tells them."""
    if not IS_GPU:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(SENSORS)}", "--format=csv,noheader,nounits"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(",")
        return dict(zip(SENSORS, map(float, values)))
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return {}


def allocated() -> int:
    """Bytes of the GPU that tensors hold now."""
    return torch.cuda.memory_allocated() if IS_GPU else 0
