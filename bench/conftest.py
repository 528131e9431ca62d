"""`pytest bench`: every suite at a size that 2 CPU cores finish in ten minutes. The variables below, and the scripts'
own options, run more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "1")
# Three rounds of every op, and no torch.compile there: it takes most of the time.
os.environ.setdefault("FASTMIM_BENCH_CALLS", "3")
os.environ.setdefault("FASTMIM_BENCH_COMPILE", "0")
