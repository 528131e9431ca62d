"""Shared by all tests: one thread per process, set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
