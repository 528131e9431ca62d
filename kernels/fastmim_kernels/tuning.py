"""Launch constants of the Triton kernels: JSON files in tuned/, one per GPU, named like it.

default.json has every constant; a GPU's file has those that are faster there. ``fastmim tune`` writes one; nothing is
tuned at a first call. Another folder, where ``FASTMIM_TUNED`` names one, is looked in first.
"""

import functools
import json
import os
import pathlib
import re

import torch

VARIABLE = "FASTMIM_TUNED"
FOLDER = pathlib.Path(__file__).parent / "tuned"
Table = dict[str, dict[str, int]]


def file_name(gpu: str) -> str:
    """ "NVIDIA H200" -> "NVIDIA_H200.json"."""
    return re.sub(r"\W+", "_", gpu) + ".json"


def folders() -> list[pathlib.Path]:
    """Where a GPU's file is looked for, in this order."""
    own = os.environ.get(VARIABLE)
    return [pathlib.Path(own), FOLDER] if own else [FOLDER]


@functools.cache
def table(gpu: str) -> Table:
    """Op -> constant -> value for a GPU; "" for none.

    Raises: ValueError where a file has a constant that there is none of.
    """
    values: Table = json.loads((FOLDER / "default.json").read_text())
    path = next((p for folder in folders() if (p := folder / file_name(gpu)).exists()), None) if gpu else None
    if path is not None:
        for op, constants in json.loads(path.read_text())["constants"].items():
            for name, value in constants.items():
                if name not in values.get(op, {}):
                    raise ValueError(f"{path}: expected constants of default.json, got {op}.{name}; tune anew.")
                values[op][name] = value
    return values


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def tuned(op: str) -> dict[str, int]:
    """The constants of an op on the current GPU."""
    return table(_gpu(torch.cuda.current_device()) if torch.cuda.is_initialized() else "")[op]
