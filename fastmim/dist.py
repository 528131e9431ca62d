"""The process group: who we are, start, end, and the few collectives that the trainer needs."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How long processes that start together may take to find each other. Source: own choice; hosts of one job boot apart.
START_S = 600
# Seconds that this process has waited for others inside a forward pass; what remains of it is its own work.
waited_s = 0.0
# Whether it does so now.
is_waiting = False
# How the backends say that another process is gone. Source: messages of gloo (Connection closed by peer, reset, refused,
# Timed out waiting) and NCCL (remote process exited, watchdog) as torch 2.13 passes them on.
PEER_SIGNS = (
    "onnection closed by peer", "onnection was likely closed", "onnection reset", "onnection refused", "imed out waiting", "imed out after",
    "Broken pipe", "remote process exited", "NCCL", "gloo",
)  # fmt: skip


class PeerError(Exception):
    """Another process of the run is gone, or does not answer."""

    exit_code = 7


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


_store: dist.Store | None = None


def launchers_store() -> dist.Store:
    """Texts by name, seen by all processes of the launcher; exists before the process group, which uses it, too."""
    global _store
    if _store is None:
        _store = next(dist.rendezvous("env://", timeout=timedelta(seconds=START_S)))[0]
    return _store


def _question(name: str) -> dist.Store:
    # torchrun may keep the store when it starts the processes again.
    return dist.PrefixStore(f"fastmim/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", launchers_store())


def from_rank_0(name: str, text: str) -> str:
    """Rank 0's text on every rank; needs no process group.

    Args:
        name: of this text; each is to be sent once in the life of the processes.
    """
    if launched_world() == 1:
        return text
    store = _question(name)
    if launched_rank() == 0:
        store.set("text", text)
    return store.get("text").decode()


def judged_by_rank_0(name: str, text: str, judge: Callable[[list[str]], str]) -> str:
    """What rank 0 makes of the texts of all ranks, on every rank; needs no process group.

    Args:
        name: of this question; each is to be asked once in the life of the processes.
        judge: called on rank 0 with the texts in rank order.
    """
    if launched_world() == 1:
        return judge([text])
    store, ranks = _question(name), range(launched_world())
    store.set(f"said/{launched_rank()}", text)
    is_judge = launched_rank() == 0
    verdict = from_rank_0(
        f"{name}/verdict", judge([store.get(f"said/{r}").decode() for r in ranks]) if is_judge else ""
    )
    store.set(f"read/{launched_rank()}", "")
    if is_judge:
        # The store may be in this process: it must not end before everybody has the verdict.
        store.wait([f"read/{r}" for r in ranks])
    return verdict


def start(device: torch.device, timeout_s: float = START_S) -> None:
    """Joins the process group of the launcher's processes (gloo on CPUs, NCCL on GPUs)."""
    if not dist.is_initialized():
        kwargs = {"device_id": device} if device.type == "cuda" else {}
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
        launchers_store().set_timeout(timeout)
        dist.init_process_group(
            backend,
            store=launchers_store(),
            rank=launched_rank(),
            world_size=launched_world(),
            timeout=timeout,
            **kwargs,
        )


def finish() -> None:
    """Leaves the process group; without it a finished process sometimes aborts."""
    global _store
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _store = None


@contextmanager
def peers_reported() -> Iterator[None]:
    """Turns what a backend raises when another process is gone into one line.

    Raises:
        PeerError: instead of that.
    """
    try:
        yield
    except RuntimeError as e:
        is_sign = isinstance(e, dist.DistError) or any(sign in str(e) for sign in PEER_SIGNS)
        if launched_world() == 1 or not is_sign:
            raise
        reason = str(e).strip().splitlines()[0]
        raise PeerError(
            f"rank {launched_rank()}: another process of the run is gone or does not answer ({reason}); look for its own message, "
            f"then continue with --resume"
        ) from e


@contextmanager
def _waiting() -> Iterator[None]:
    global waited_s, is_waiting
    began, is_waiting = time.perf_counter(), True
    try:
        yield
    finally:
        waited_s, is_waiting = waited_s + time.perf_counter() - began, False


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's values, in place."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def broadcast_text(text: str, device: torch.device) -> str:
    """Rank 0's text on every rank."""
    if world_size() == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    count = broadcast(torch.tensor(len(data), device=device))
    if not is_main():
        data = torch.empty(int(count), dtype=torch.uint8, device=device)
    return bytes(broadcast(data).tolist()).decode()


def sum_over_ranks(numbers: list[int], device: torch.device) -> list[int]:
    total = torch.tensor(numbers, dtype=torch.int64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def gather_rows(x: Tensor) -> Tensor:
    """(B, ...) of each rank -> (world * B, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    # torch 2.13 renamed the collective; 2.11 has only the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with _waiting():
        gather(out, x.detach().contiguous())
    return out


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        with _waiting():
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

    def gather(self, value: float) -> list[float]:
        """Every rank's number, in rank order."""
        if self._group is None:
            return [value]
        values = [torch.zeros((), dtype=torch.float64) for _ in range(world_size())]
        dist.all_gather(values, torch.tensor(value, dtype=torch.float64), group=self._group)
        return [float(v) for v in values]

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
