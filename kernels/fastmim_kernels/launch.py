"""Launch settings that Triton kernels share."""


def row_config(width: int, itemsize: int) -> dict[str, int]:
    """Launch settings of kernels that move rows: BLOCK values at a time, 16 bytes per thread and load.

    One warp moves 512 bytes per load. With one to four loads in flight per thread, the 32 to 64 warps of a
    multiprocessor keep the 32 KB in flight that the memory of an H100 or H200 needs (bandwidth x latency).
    """
    block = min(next_power_of_2(width), 4096)
    return {"BLOCK": block, "num_warps": max(1, min(8, block * itemsize // 2048))}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
