"""Nothing in a step reads the device: the host may run ahead of a GPU from one line of metrics to the next."""

from pathlib import Path

import pytest
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import model_spec
from test_accumulation import OPTIONS, SD_DEC, OneStep, build, engine_spec, make_batch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim.config import TrainConfig
from fastmim.engine.single import SingleEngine
from fastmim.methods import base
from fastmim.metrics import Display, Meter
from fastmim.step import StepProgram
from fastmim.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small")
CASES = {name: (name, options) for name, options in OPTIONS.items()} | {"sd_dec": ("icmae", SD_DEC)}
aten = torch.ops.aten
# What a GPU would have to hand a number, or the size of a result, to the host for.
READS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount,
}  # fmt: skip


class HostReads(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        if func.overloadpacket in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_reads():
    x = torch.arange(4.0)
    for read in (lambda: x.sum().item(), lambda: bool(x.sum()), lambda: x.nonzero(), lambda: float(x[0])):
        with HostReads() as watch:
            read()
        assert watch.found
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros(()).item()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_read_nothing(case, accumulate, monkeypatch):
    """On tensors without values, as those of a GPU are to the host: reading one raises."""
    name, options = CASES[case]
    module = base.find(name)
    with torch.device("meta"):
        method = base.build(name, model_spec(), module.Config(**options), 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in method.modules():  # as `to_empty` does, which refuses tensors that something else knows of
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(tensor.shape), tensor.requires_grad)
            for name, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[name] = torch.empty_like(tensor, device="cpu")
        monkeypatch.setattr(method, "to", lambda device: method)  # it is there, and cannot be moved like this
        engine = SingleEngine(method, engine_spec(accumulate))
        program = StepProgram(method, engine, accumulate, "step")
        crops = (torch.zeros(8, method.model.in_chans, *crop.size, dtype=torch.uint8) for crop in method.crops)
        batch, rng = Batch(tuple(crops), torch.arange(8)), torch.zeros(2, dtype=torch.int64)
        with HostReads() as watch:
            outputs = program.gradient(batch, rng)
    assert len(outputs) == accumulate and watch.ops > 100 and not watch.found
    assert all(p.grad is not None for n, p in method.named_parameters() if n.startswith("encoder.blocks.0.fc1"))


@pytest.mark.parametrize("case", ["mae", "cmae"])
def test_update_and_meter_read_nothing(case, monkeypatch):
    """Clipping, AdamW, EMA, skipping and sums, on a CPU in the place of a GPU."""
    method = build(*CASES[case])
    engine = SingleEngine(method, engine_spec(1)._replace(clip=1.0))
    config = TrainConfig(batch_size=8, accumulate=1, steps=9)
    trainer = Trainer(config, method, engine, OneStep(), Path("unused"), Display(1, enabled=False))
    whole = make_batch(method)
    batch = Batch(tuple(crop[:8] for crop in whole.crops), whole.ids[:8])
    meter, rng = Meter(engine.device), torch.tensor([3, 11])
    trainer._train_step(batch, rng, meter)  # makes AdamW's moments
    outputs = trainer.program.gradient(batch, rng)
    # The one read there is: the flag of the step before, a copy of which is on the host by then.
    monkeypatch.setattr(trainer, "_settle", lambda: None)
    monkeypatch.setattr(trainer.program, "gradient", lambda batch, rng: outputs)
    with HostReads() as watch:
        trainer._train_step(batch, rng, meter)
    assert watch.ops > 10 and not watch.found
    assert rng.tolist() == [3, 13] and meter.read()["skipped"] == 0
