"""What an engine costs beside plain torch, in one process: an interleaved run of ViT-S; `pytest bench/bench_engines.py -s`.

Each engine takes a step in turn, so that a slow phase of the machine hits all of them. Compared is the processor's time,
which other programs disturb less than the clock. The losses must be equal, or there is no number.
"""

import statistics
import time

import pytest
import torch
from fastmim_pipelines import make_loader

from fastmim import dist
from fastmim.arguments import parse_train
from fastmim.boot import prepare_process
from fastmim.engine import base as engines
from fastmim.methods import base as methods
from fastmim.saving import HostCopy

DEVICE = torch.device("cpu")
BATCH, STEPS, WARMUP = 8, 6, 2
ENGINES = [("single", 0), ("zero", 0), ("zero", 1), ("zero", 2), ("zero", 3)]
# Issue: the zero engine at one process costs at most 5 % over the plain one.
MOST_OVERHEAD = 1.05


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
def bench_engines():
    prepare_process()
    dist.start(DEVICE)
    variants = {name: Variant(*name) for name in ENGINES}
    for _ in range(WARMUP + STEPS):
        losses = [variant.step() for variant in variants.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4), "no cost of a wrong loss"
    print(
        f"\nMAE, ViT-S/16 at 224, batch {BATCH}, fp32, {torch.get_num_threads()} thread(s), torch {torch.__version__}, n={STEPS}"
    )
    ratios = {}
    for (engine, stage), variant in variants.items():
        pairs = zip(variant.seconds[WARMUP:], variants["single", 0].seconds[WARMUP:])
        ratios[engine, stage] = statistics.median(mine / plain for mine, plain in pairs)
        median = statistics.median(variant.seconds[WARMUP:])
        name = engine if engine == "single" else f"{engine}, stage {stage}"
        print(f"  {name:<14} {1e3 * median:7.0f} ms of processor time per step, {ratios[engine, stage]:.3f} of single")
    plain = variants["single", 0]
    copy, times = HostCopy(), []
    for _ in range(4):
        began = time.process_time()
        plain.engine.save(copy.put)
        times.append(time.process_time() - began)
    size = sum(t.nbytes for tensors in copy.files.values() for t in tensors.values())
    share = statistics.median(times[1:]) / statistics.median(plain.seconds[WARMUP:])
    print(f"  a save stops training for the copy of {size / 1e6:.0f} MB: {1e3 * statistics.median(times[1:]):.0f} ms, "
          f"{100 * share:.1f} % of a step; the first one {1e3 * times[0]:.0f} ms")  # fmt: skip
    assert ratios["zero", 0] <= MOST_OVERHEAD
    dist.finish()
