"""torch.compile for transformer blocks, in place: names, checkpoints and what is exported stay as they are."""

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager

import torch
from fastmim_kernels import dispatch
from torch import nn

from fastmim.config import ConfigError

# Graphs of one block: its shape, the network's first block or a later one, with gradient or without. torch's own limit
# of 8 is that of CMAE with its four networks.
MOST_GRAPHS = 64


def blocks_of(method: nn.Module) -> list[nn.Module]:
    """All that repeat: what the lists of modules hold."""
    return [part for owner in method.modules() if isinstance(owner, nn.ModuleList) for part in owner]


def compile_blocks(method: nn.Module, backend: str = "inductor") -> int:
    """Compiles every block of a method when it first runs; returns how many there are.

    Blocks keep their place and their parameters' names: torch replaces what a call of the module does, not the module.
    Each shape gets a graph of its own; a part that torch cannot trace is an error, never a silent graph break.
    """
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    # Traced functions look them up, and may not load them.
    for op in dispatch.ops():
        dispatch.load(op, "reference")
    blocks = blocks_of(method)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)
    return len(blocks)


def check(device: torch.device, zero_stage: int) -> None:
    """Whether blocks can be compiled in a run.

    Raises:
        ConfigError: what makes code for the device is missing, or something else stands against it.
    """
    if zero_stage == 3:
        raise ConfigError(
            "--compile blocks: expected ZeRO stage 0, 1 or 2, got 3, which gathers parameters inside blocks"
        )
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--compile blocks: expected Triton for a GPU, got none; pip install 'fastmim[triton]'")
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"--compile blocks: expected a C++ compiler for a CPU, got no {compiler}; install one or name it in CXX, or "
            f"use --compile off"
        )


def uncompiled() -> AbstractContextManager:
    """Within it, blocks run as if they were not compiled: evaluation has other shapes, and few batches of each."""
    return torch.compiler.set_stance("force_eager")
