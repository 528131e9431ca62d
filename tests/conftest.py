"""Shared by all tests: one thread per process, set before torch is imported; and real photographs, where there are some."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def photographs() -> Path:
    """A folder that is no part of the project: photos/ (JPEGs in class folders) and cifar10-test.zip.

    The environment variable FASTMIM_PHOTOS names it; tests that use it are skipped where there is none.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FASTMIM_PHOTOS", beside))
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}: set FASTMIM_PHOTOS")
    return folder
