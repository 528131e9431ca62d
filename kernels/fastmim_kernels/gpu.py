"""What launches ask of the GPU, and of torch's switches: none of it changes how a kernel is compiled."""

import functools

import torch

from .launch import cdiv


def allows_tf32() -> bool:
    """Whether torch's own products of float32 on GPUs may round their inputs."""
    # Once the newer of its two switches was used, torch refuses to tell the older one's state.
    switch = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if switch is None else switch == "tf32"


def multiprocessors() -> int:
    """Of the current GPU; an H200's where there is none."""
    return _multiprocessors(torch.cuda.current_device()) if torch.cuda.is_initialized() else 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_per_tensor(largest: int, block: int, tensors: int) -> int:
    """For a kernel that takes many tensors of very different sizes, in strides: few programs find nothing to do, and all
    multiprocessors have some, however few tensors there are."""
    return min(cdiv(largest, block), max(128, cdiv(8192, tensors)))
