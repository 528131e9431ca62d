"""Training-step benchmark: images/s of each method and precision in one interleaved run; `pytest bench -s`.

Each variant takes a step in turn, so that a slow phase of the machine hits all of them; the median step is reported.
No speed is printed for a variant whose loss is not finite.
"""

import math
import statistics
import time

import pytest
import torch
from fastmim_pipelines import make_loader

from fastmim.arguments import parse_train
from fastmim.device import default_precision
from fastmim.engine import base as engines
from fastmim.methods import base as methods

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (method, model, image size, patch, batch): what fits the device in seconds.
CASES = (
    [("mae", "vit_base", 224, 16, 256), ("cmae", "vit_base", 224, 16, 128), ("mae", "vit_large", 224, 16, 128)]
    if DEVICE.type == "cuda"
    else [("mae", "vit_tiny", 224, 16, 16), ("cmae", "vit_tiny", 224, 16, 16)]
)
STEPS, WARMUP = (30, 10) if DEVICE.type == "cuda" else (5, 2)


class Variant:
    """One method in one precision, able to take a step."""

    def __init__(self, case: tuple, precision: str):
        method, model, side, patch, self.batch_size = case
        config = parse_train(["--method", method, "--data", ".", "--model", model, "--image-size", str(side),
                              "--patch-size", str(patch), "--batch-size", str(self.batch_size)])  # fmt: skip
        self.method = methods.build(method, config.model_spec(), config.options, seed=0)
        self.engine = engines.build("single", self.method, engines.EngineSpec(
            device=DEVICE, precision=precision, accumulate=1, micro_batch=self.batch_size, lr=1e-4, weight_decay=0.05,
            betas=(0.9, 0.95), clip=None, zero_stage=0))  # fmt: skip
        loader, _ = make_loader("synthetic", self.method.crops, batch_size=self.batch_size, in_chans=3)
        batch = next(iter(loader.epoch(0)))
        self.batch = batch._replace(crops=tuple(c.to(DEVICE) for c in batch.crops), ids=batch.ids.to(DEVICE))
        self.rng = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        self.pairs = self.method.ema_pairs()
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        out = self.engine.forward(self.batch, self.rng)
        self.engine.backward(out.loss)
        self.engine.step()
        self.engine.ema(self.pairs, self.method.momentum(0.0))
        self.rng[1] += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        self.loss = out.loss.detach()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}p{c[3]}-b{c[4]}")
def bench_step(case):
    low = default_precision(DEVICE)[0]
    variants = {precision: Variant(case, precision) for precision in dict.fromkeys(["fp32", low])}
    for _ in range(WARMUP + STEPS):
        for variant in variants.values():
            variant.step()
    print(
        f"\n{case[0]} {case[1]}/{case[3]} at {case[2]}, batch {case[4]}, {DEVICE.type}, torch {torch.__version__}, n={STEPS}"
    )
    baseline = statistics.median(variants["fp32"].seconds[WARMUP:])
    for precision, variant in variants.items():
        assert math.isfinite(float(variant.loss)), "no speed for a wrong loss"
        median = statistics.median(variant.seconds[WARMUP:])
        print(
            f"  {precision}: {variant.batch_size / median:8.1f} img/s  {1e3 * median:8.1f} ms  {baseline / median:5.2f} x fp32"
        )
