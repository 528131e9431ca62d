"""What a training step asks of the device: operations, waits of the host, bytes kept for the backward pass."""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.memory import Saved

# Operations after which the host must wait for a GPU: they give it a number, or tensors of a size that depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")
# Calls of CUDA in which the host waits, and in which it starts something; and what the profiler sees that is no kernel.
CUDA_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
CUDA_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
NO_KERNEL = ("Memcpy", "Memset")


class Counter(TorchDispatchMode):
    """Counts the operations that compute or move something; views do neither."""

    def __init__(self):
        super().__init__()
        self.ops = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.ops += 1
        name = func.overloadpacket.__name__
        self.waits += any(name.startswith(wait) for wait in WAITS)
        return func(*args, **(kwargs or {}))


def counted(way) -> dict:
    """What one step of a way of bench_step.py asks for, as far as it can be counted.

    launches: what the host starts; on a CPU operations where they meet the device, so that one of ours counts as one,
    whatever it is made of. kernels: what a GPU runs. host_syncs: how often the host waits for the device. saved_mib: kept
    for the backward pass, of the largest micro-batch. counted_parts: the step's micro-batches, which are all counted.
    """
    is_gpu = way.batch.ids.is_cuda
    return (count_step(way) if way.counts else {}) | (count_kernels(way) if is_gpu else {})


def count_step(way) -> dict:
    """By what torch dispatches.

    On CPUs our ops look at values to check them; they do not on GPUs, nor under torch.compile, nor here. Waits are those of
    forward passes: on a CPU a look at the loss's weight or the optimizer's step counts, which cost nothing there and do
    not happen on a GPU, is like any other.
    """
    way.prepare()
    return _count_program(way) if hasattr(way, "program") else _count_passes(way)


def _count_program(way) -> dict:
    """Of a way that steps as the trainer does, which may cut the batch."""
    known = [*way.method.parameters(), *way.engine.copies.values()]
    counter, saved, waits = Counter(), [], 0
    forward = way.program.forward

    def watched(micro, *rest):
        nonlocal waits
        saved.append(Saved([*known, *micro.crops, micro.ids]))
        before = counter.waits
        with saved[-1]:
            out = forward(micro, *rest)
        waits += counter.waits - before
        return out

    with patch.object(way.program, "forward", watched), _unchecked(), counter:
        way.step()
    return _counts(counter.ops, waits, max(each.bytes for each in saved), len(saved))


def _count_passes(way) -> dict:
    """Of a way that takes the batch as a whole."""
    known = [*way.method.parameters(), *way.model.parameters(), *way.batch.crops, way.batch.ids]
    saved, forward, rest = Saved(known), Counter(), Counter()
    with _unchecked(), forward, saved:
        loss = way.forward()
    with _unchecked(), rest:
        way.finish(loss)
    return _counts(forward.ops + rest.ops, forward.waits + way.reads_loss, saved.bytes, 1)


def _counts(launches: int, waits: int, saved: int, parts: int) -> dict:
    return {"launches": launches, "host_syncs": waits, "saved_mib": saved / 2**20, "counted_parts": parts}


def _unchecked() -> ExitStack:
    """Within it, ops do not look at values. (Under `is_compiling` they would, besides, take other ways.)"""
    stack = ExitStack()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastmim_kernels.") and hasattr(module, "is_readable"):
            stack.enter_context(patch.object(module, "is_readable", return_value=False))
    return stack


def count_kernels(way) -> dict:
    """By the profiler of a GPU."""
    way.prepare()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        way.step()
        torch.cuda.synchronize()
    return tally((e.name, is_kernel(e)) for e in profile.events())


def is_kernel(event) -> bool:
    """Whether an event of the profiler ran on the GPU; ranges that someone named do not count."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def tally(events) -> dict:
    """launches, kernels and host_syncs of (name, whether it ran on the GPU) pairs."""
    found = {"launches": 0, "kernels": 0, "host_syncs": 0}
    for name, is_on_gpu in events:
        found["kernels"] += is_on_gpu and not name.startswith(NO_KERNEL)
        found["launches"] += not is_on_gpu and name.startswith(CUDA_LAUNCHES)
        found["host_syncs"] += not is_on_gpu and name in CUDA_WAITS
    return found
