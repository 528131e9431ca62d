"""Real JPEG files to read, a small demo set drawn once per session; what a test starts or finds in the environment."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fastmim_pipelines import native_decode
from fastmim_pipelines.demo import write_demo


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """Folder with train/ (60 pictures) and val/ (20)."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, images=60, val_images=20, workers=1, progress=lambda line: None)
    return folder


@pytest.fixture
def children() -> Callable[[], list[BaseProcess]]:
    """The running processes that this test has started; those of others do not count."""
    before = set(multiprocessing.active_children())
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


@pytest.fixture
def unforced(monkeypatch):
    """Whatever the environment says, the decoder is chosen."""
    monkeypatch.delenv(native_decode.VARIABLE, raising=False)
