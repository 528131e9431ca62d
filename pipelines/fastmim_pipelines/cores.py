"""How many processor cores are there for this process, and how many loader processes follow from that."""

from __future__ import annotations

import os
from pathlib import Path

_MOST_WORKERS = 16


def available_cores() -> int:
    """Cores that this process may use: the smaller of its affinity mask and its container's CPU quota, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or another format: the mask alone decides
    return max(1, allowed)


def default_workers(world: int, *, trains_on_cpu: bool) -> int:
    """Loader processes per rank: an equal share of the node's cores, less the trainer's own on a CPU; 1..16."""
    # The launchers set LOCAL_WORLD_SIZE: ranks on other nodes take none of these cores.
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    share = available_cores() // max(1, local_world) - (1 if trains_on_cpu else 0)
    return min(_MOST_WORKERS, max(1, share))
