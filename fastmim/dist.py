"""The process group: who we are, start, end, and the few collectives that the trainer needs."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def launched_world() -> int:
    """Number of processes that the launcher started; needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def start(device: torch.device) -> None:
    """Joins the process group of the launcher's processes (gloo on CPUs, NCCL on GPUs)."""
    if not dist.is_initialized():
        kwargs = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10), **kwargs)


def finish() -> None:
    """Leaves the process group; without it a finished process sometimes aborts."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world * B, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    # torch 2.13 renamed the collective; 2.11 has only the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x.detach().contiguous())
    return out


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Each rank's loss depends on every rank's x.
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def differentiable_mean(x: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, through which gradients flow to all of them."""
    return x if world_size() == 1 else _SumOverRanks.apply(x) / world_size()


def mean_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


class StopAgreement:
    """Lets all ranks leave the loop at the same step when any of them was asked to stop.

    The flags travel over gloo while the next step computes: a rank that raises its flag before step n makes all
    ranks stop after step n; a GPU never waits for it.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple[dist.Work, Tensor] | None = None

    def agreed(self, asked: bool) -> bool:
        """True once any rank's flag has reached everybody. Call once per step, on every rank."""
        if self._group is None:
            return asked
        agreed = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([int(asked)])
        self._pending = None if agreed else (dist.all_reduce(flag, group=self._group, async_op=True), flag)
        return agreed
