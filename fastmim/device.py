"""Where to train, and in which arithmetic."""

import torch

from fastmim.config import ConfigError
from fastmim.dist import local_rank


def pick_device(wanted: str) -> torch.device:
    """auto | cpu | cuda -> this process's device.

    Raises:
        ConfigError: CUDA asked for, but not there; or more local processes than GPUs.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: expected a GPU, found none that torch can use; use --device cpu")
    if wanted == "cpu" or not has_cuda:
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank()}: expected at most one process per GPU, found {torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def default_precision(device: torch.device) -> tuple[str, str]:
    """(precision, reason): bf16 where the device computes in it."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has it"
        return "fp32", "the GPU has no bf16; --precision fp16 is possible"
    products = bfloat16_products()
    return ("bf16", f"the CPU has {products}") if products else ("fp32", "the CPU has no bf16 instructions")


def bfloat16_products() -> str:
    """The best instructions by which this CPU multiplies bfloat16: AMX, AVX512_BF16, or none."""
    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, test, lambda: False)():
            return name
    return ""


def cpu_capability() -> str:
    """This CPU's instruction set by torch's name, and its products of bfloat16."""
    return " with ".join(filter(None, (torch.backends.cpu.get_cpu_capability(), bfloat16_products())))


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the device; None for a CPU, which swaps or fails in its own way."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
