"""What a training step asks of the device: operations, waits of the host, bytes kept for the backward pass."""

from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.memory import Saved

# Operations after which the host must wait for a GPU: they give it a number, or tensors of a size that depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")


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


def count_step(way) -> dict:
    """ops, host_syncs and saved_mib of one step of a way of bench_step.py.

    Ops are counted where they meet the device, so that one of ours counts as one, whatever it is made of. On CPUs our ops
    look at values to check them; they do not on GPUs, nor under torch.compile, nor here. The optimizer's waits are left
    out: on a CPU those for its step counts, which never leave the host, look like others.
    """
    way.prepare()
    parameters = [*way.method.parameters(), *way.batch.crops, way.batch.ids]
    saved, forward, rest = Saved(parameters), Counter(), Counter()
    with forward, saved, patch("torch.compiler.is_compiling", return_value=True):
        loss = way.forward()
    with rest:
        way.finish(loss)
    waits = forward.waits + way.reads_loss
    return {"ops": forward.ops + rest.ops, "host_syncs": waits, "saved_mib": saved.bytes / 2**20}
