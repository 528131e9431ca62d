"""Training batches from a folder of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .index import FolderIndex, ImageIndex
from .loader import CropLoader
from .spec import CropSpec


class FolderLoader(CropLoader):
    """Batches of random crops of the images below a folder.

    Args:
        folder: path, or an index that is there already.
        crops, options: see CropLoader.
    Raises:
        ValueError: arguments out of range, or fewer images than one batch.
        DataError: from the constructor, an unusable folder; from the iterator, an unusable image, or too many of them.
    """

    def __init__(self, folder: str | os.PathLike[str] | ImageIndex, crops: Sequence[CropSpec], **options: Any):
        super().__init__(FolderIndex(folder) if isinstance(folder, str | os.PathLike) else folder, crops, **options)
