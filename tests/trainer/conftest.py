"""Real images for the tests of the trainer."""

from pathlib import Path

import pytest
from trainer_run import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (36 images) and val/ (9 images)."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 12)
    write_images(root / "val", 3, seed=1)
    return root
