"""What an engine costs beside plain torch, in one process: an interleaved run of ViT-S; `pytest bench/bench_engines.py -s`.

Each engine takes a step in turn, so that a slow phase of the machine hits all of them. Compared is the processor's time,
which other programs disturb less than the clock. The losses must be equal, or there is no number. Without DeepSpeed, `single`
is alone. Stages 1 to 3 are forced: a run of one process takes stage 0 for them (`engines.choose`), and these rows say what that
spares.
"""

import importlib.util
import statistics
import time
from operator import truediv

import pytest
import torch
from fastmim_pipelines import make_loader
from machine import machine
from points import Points

from fastmim import dist
from fastmim.arguments import parse_train
from fastmim.boot import prepare_process
from fastmim.engine import base as engines
from fastmim.methods import base as methods
from fastmim.saving import HostCopy

DEVICE = torch.device("cpu")
BATCH, STEPS, WARMUP = 8, 6, 2
CASE = f"mae vit_small/16 224px b{BATCH} fp32"
SINGLE = "single"
# The zero engine at one process costs at most 5 % over the plain one: own bar.
MOST_OVERHEAD = 1.05
ENGINES = {SINGLE: ("single", 0)} | {f"zero, stage {stage}": ("zero", stage) for stage in range(4)}


class Variant:
    """MAE with ViT-S on one engine, able to take a step."""

    def __init__(self, engine: str, stage: int):
        config = parse_train(["--method", "mae", "--data", ".", "--model", "vit_small", "--batch-size", str(BATCH)])
        self.method = methods.build("mae", config.model_spec(), config.options, seed=0)
        self.engine = engines.build(engine, self.method, engines.EngineSpec(
            device=DEVICE, precision="fp32", accumulate=1, micro_batch=BATCH, lr=1e-4, weight_decay=0.05,
            betas=(0.9, 0.95), clip=None, zero_stage=stage))  # fmt: skip
        loader, _ = make_loader("synthetic", self.method.crops, batch_size=BATCH, in_chans=3)
        self.batch = next(iter(loader.epoch(0)))
        self.rng = torch.zeros(2, dtype=torch.int64)
        self.seconds: list[float] = []

    def step(self) -> float:
        began = time.process_time()
        out = self.engine.forward(self.batch, self.rng)
        self.engine.backward(out.loss)
        self.engine.step()
        self.rng[1] += 1
        self.seconds.append(time.process_time() - began)
        return out.loss.item()


@pytest.mark.timeout(1200)
def bench_engines(results, told):
    points = Points(results / "engines.jsonl")
    if points.has(lambda r: r["case"], CASE):
        pytest.skip(f"{points.path} has it already")
    prepare_process()
    dist.start(DEVICE)
    has_zero = importlib.util.find_spec("deepspeed") is not None
    variants = {name: Variant(*of) for name, of in ENGINES.items() if has_zero or of[0] == SINGLE}
    for _ in range(WARMUP + STEPS):
        losses = [variant.step() for variant in variants.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4), "no cost of a wrong loss"
    times = {name: variant.seconds[WARMUP:] for name, variant in variants.items()}
    points.add({"suite": "engines", "case": CASE, "engine": name, "n": STEPS, "ms": 1e3 * statistics.median(seconds),
                "ratio": statistics.median(map(truediv, seconds, times[SINGLE])), **machine()}
               for name, seconds in times.items())  # fmt: skip
    print("" if has_zero else "\n  not measured: zero (DeepSpeed is not installed)")
    for r in points.records:
        print(f"  {r['engine']:<14} {r['ms']:7.0f} ms of processor time per step, {r['ratio']:.3f} of single")
    told(times[SINGLE], {name: statistics.median(seconds) for name, seconds in times.items()})
    tell_saving(variants[SINGLE], statistics.median(times[SINGLE]))
    for variant in variants.values():
        variant.engine.close()
    dist.finish()
    taken = {engines.choose("zero", stage, 1, 0, None)[:2] for stage in range(4)}
    assert taken == {("zero", 0)}, "the bar is that of what runs"
    assert not has_zero or points.records[1]["ratio"] <= MOST_OVERHEAD


def tell_saving(plain: Variant, step: float) -> None:
    copy, times = HostCopy(), []
    for _ in range(4):
        began = time.process_time()
        plain.engine.save(copy.put)
        times.append(time.process_time() - began)
    size = sum(t.nbytes for tensors in copy.files.values() for t in tensors.values())
    median = statistics.median(times[1:])
    print(f"  a save stops training for the copy of {size / 1e6:.0f} MB: {1e3 * median:.0f} ms, {100 * median / step:.1f} % of a "
          f"step; the first one {1e3 * times[0]:.0f} ms")  # fmt: skip
