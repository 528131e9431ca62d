"""What must happen in a process before torch is imported, and the console script's entry."""

import os
import socket
import sys


def prepare_process() -> None:
    """Sets what the launchers do not; existing variables always win.

    OMP_NUM_THREADS: the deepspeed launcher leaves it unset, and two ranks on two cores then run 22-50x slower.
    GOMP_SPINCOUNT: idle threads of libgomp spin for long; with a decoding process beside two threads on two cores, a
    step took 3 times as long as with a short spin.
    THP_MEM_ALLOC_ENABLE: torch then asks for huge pages, where the system grants them to who asks; 7 % less processor
    time per step of CMAE on 2 cores (medians of 6 steps, 2 interleaved runs each).
    RANK .. MASTER_PORT: plain `python` has none, and DeepSpeed would ask for MPI instead.
    """
    env = os.environ
    local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 1)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_world)))
    env.setdefault("GOMP_SPINCOUNT", "1000")
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        env.setdefault(name, value)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())
    if env["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # A host name that resolves elsewhere makes gloo refuse connections on a single machine.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Console script `fastmim`."""
    prepare_process()
    from fastmim.cli import run

    sys.exit(run(sys.argv[1:]))
