"""Real images for the tests of the trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import Server
from slow_reference import SMALL
from trainer_run import ROOT, environment, write_images

from fastmim.config import SIZES, Size


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (36 images) and val/ (9 images)."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 12)
    write_images(root / "val", 3, seed=1)
    return root


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts jobs of one or more processes without a launcher."""
    started = Server(environment(), ROOT)
    yield started
    started.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_tiny is SMALL for one test."""
    monkeypatch.setitem(SIZES, "vit_tiny", Size(*SMALL))
