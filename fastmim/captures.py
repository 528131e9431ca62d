"""What is kept of a skipped step, so that `fastmim replay` can take it again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmim import checkpoint, dist
from fastmim.boxes import write_boxes
from fastmim.dist import is_main
from fastmim.engine.base import MODEL_FILE, Engine
from fastmim.saving import HostCopy

CAPTURES_KEPT = 2


class Taken(NamedTuple):
    """What a capture needs to know of a step; nothing is read from the device."""

    step: int
    ids: Tensor
    losses: list[Tensor]
    """Of each micro-batch."""
    grad_norm: Tensor
    boxes: np.ndarray | None = None
    """Of all images, as the loader had them."""


def keep(root: Path, taken: Taken, engine: Engine, meta: dict[str, Any], say: Callable[[str], None]) -> Path:
    """Writes the weights that the step started from, its place in the data, its boxes, and what came out. Collective.

    Args:
        root: folder of captures.
        meta: of a checkpoint.

    Returns:
        The capture's folder. It does not exist where the disk refused, which is said.
    """
    copy = HostCopy()
    engine.save(lambda file, name, tensor: copy.put(file, name, tensor) if file == MODEL_FILE else None)
    copy.finish(engine.device)
    means = dist.mean_over_ranks(torch.stack([loss.float() for loss in taken.losses])).tolist()
    meta = meta | {
        "ids": dist.gather_rows(taken.ids.to(engine.device)).tolist(), "losses": [repr(mean) for mean in means],
        "grad_norm": repr(taken.grad_norm.item()),
    }  # fmt: skip
    if is_main():
        try:
            temporary = checkpoint.prepare(root)
            hashes = {MODEL_FILE: checkpoint.write_tensors(temporary / MODEL_FILE, copy.files[MODEL_FILE])}
            if taken.boxes is not None:
                write_boxes(temporary, taken.boxes)
            checkpoint.commit(temporary, root, taken.step, meta, CAPTURES_KEPT, hashes)
        except OSError as e:
            say(f"warning   no capture was kept: {e}")
    return root / checkpoint.folder_name(taken.step)
