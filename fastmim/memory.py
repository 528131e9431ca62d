"""Memory of a training step, found by running it on tensors without values: a second, whatever the size of the model.

What is counted is what the allocator is asked for. Measured against torch's profiler (CPU, ViT-Ti, all methods, fp32 and
bf16): within 1 %.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from fastmim_kernels import dispatch
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmim import attention
from fastmim.config import ModelSpec, TrainConfig
from fastmim.methods import base as methods
from fastmim.recompute import Checkpointing as Policy
from fastmim.recompute import set_checkpointing


class StepMemory(NamedTuple):
    """Bytes of one micro-batch."""

    saved: int
    """Kept from the forward for the backward pass, besides parameters and the batch."""
    peak: int
    """Largest sum of activations, temporaries and gradients; not parameters, optimizer state and the batch."""
    ops: int
    """Operations, views not counted."""


class Live(TorchDispatchMode):
    """Sums the storages that are alive."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = self.ops = 0
        self.known: dict[int, object] = {_key(t): None for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += not func.is_view
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.known:
            return
        size = storage.nbytes()

        def forget(_) -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, forget)
        self.add(size)

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def trace_step(
    name: str,
    model: ModelSpec,
    options: Any,
    batch: int,
    *,
    low_precision: bool,
    gradient_share: float = 1.0,
    policy: Policy = "none",
    device: str = "cpu",
) -> StepMemory:
    """Runs forward and backward of a method without computing anything.

    Args:
        name, model, options: of the method.
        batch: images.
        low_precision: bf16 instead of fp32.
        gradient_share: share of each gradient that stays once it is complete: 1 / ranks where it is sharded, 0 where
            it has a place of its own (DDP's buckets).
        policy: what blocks do not keep, see recompute.py.
        device: its type. A GPU need not be there, nor be what this torch was built for.
    """
    with torch.device("meta"):
        method = methods.build(name, model, options, 0)
    # On tensors of a CPU, whatever the device: but for these two, ops keep the same.
    keeping = _as_on_gpus() if device == "cuda" else nullcontext()
    with keeping, FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        set_checkpointing(method, policy)
        images = (torch.zeros(batch, model.in_chans, *crop.size, dtype=torch.uint8) for crop in method.crops)
        data, rng = Batch(tuple(images), torch.arange(batch)), torch.zeros(2, dtype=torch.int64)
        given = [*method.parameters(), *method.buffers(), *data.crops, data.ids, rng]
        with Live(given) as live:
            for parameter in method.parameters():
                if parameter.requires_grad:
                    hook = partial(_shard, live=live, share=gradient_share)
                    parameter.register_post_accumulate_grad_hook(hook)
            saved = Saved(given)
            with saved, torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                loss = method(data, rng).loss
            loss.backward()
    return StepMemory(saved.bytes, live.peak, live.ops)


@contextmanager
def _as_on_gpus() -> Iterator[None]:
    """Attention is fused whatever the dtype; linear layers are torch's, and GELU's result is kept for them."""
    with attention.as_on_gpus(), dispatch.reference_of("dense"):
        yield


def _shard(parameter: Tensor, live: Live, share: float) -> None:
    live.now -= int(parameter.grad.untyped_storage().nbytes() * (1 - share))


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that a forward pass saves for the backward pass, each once; see also bench.

    Args:
        besides: tensors that exist anyway.
    """

    def __init__(self, besides: list[Tensor]):
        self.bytes = 0
        self._seen = {_key(t): None for t in besides}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in self._seen:
            # Held, so that no other storage gets the same address meanwhile.
            self._seen[key] = tensor.untyped_storage()
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._seen.clear()


# glibc maps every request above 32 MB afresh, and the system clears it page by page. Below, a step's memory is used again
# by the next; half of it measured best (ViT-B MAE, 32 images, one thread: 7.9 images/s whole, 9.2 in halves, 7.6 in
# quarters; ViT-S, 64 images: 8.0, 14.2, 13.2).
SMALL_TENSOR = 16 << 20


class Largest(TorchDispatchMode):
    """The largest storage, in bytes, that an op makes of a batch: what is made of weights alone does not grow with it.

    Args:
        batch: tensors of the batch.
    """

    def __init__(self, batch: Iterable[Tensor]):
        super().__init__()
        self.bytes = 0
        # Held, so that no other storage gets the same address meanwhile.
        self._of_batch = {_key(t): t.untyped_storage() for t in batch}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        if any(_key(t) in self._of_batch for t in given):
            for tensor in made:
                if _key(tensor) not in self._of_batch:
                    self._of_batch[_key(tensor)] = tensor.untyped_storage()
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def largest_tensor(name: str, model: ModelSpec, options: Any, batch: int, *, low_precision: bool) -> int:
    """Bytes of the largest tensor that the forward pass of a method makes of a batch; nothing is computed."""
    with torch.device("meta"):
        method = methods.build(name, model, options, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        images = (torch.zeros(batch, model.in_chans, *crop.size, dtype=torch.uint8) for crop in method.crops)
        data, rng = Batch(tuple(images), torch.arange(batch)), torch.zeros(2, dtype=torch.int64)
        with Largest([*data.crops, data.ids]) as largest, torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            method(data, rng)
    return largest.bytes


def micro_batches(config: TrainConfig, method: nn.Module, world: int, device: torch.device) -> int:
    """Into how many micro-batches a CPU should cut its share of a step, see SMALL_TENSOR; 1 on GPUs.

    Args:
        config: with a precision.
        method: the one that is named there.
    """
    local, group = config.batch_size // world, method.batch_multiple
    if device.type != "cpu" or method.mixes_images or local % group:
        return 1
    tokens = config.model_spec().num_patches + 1
    bound = tokens * 4 * max((m.out_features for m in method.modules() if isinstance(m, nn.Linear)), default=0)
    if local * bound <= SMALL_TENSOR:
        return 1
    trial = min(local, 8 * group)
    each = largest_tensor(
        config.method, config.model_spec(), config.options, trial, low_precision=config.precision == "bf16"
    )
    fit = (parts for parts in range(1, local // group + 1) if local % (parts * group) == 0)
    return next((parts for parts in fit if each * local <= SMALL_TENSOR * trial * parts), local // group)
