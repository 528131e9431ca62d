"""Shared by all tests: one thread per process, and helpers to run the trainer as a user would."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
