"""The numbers of a published recipe in a run, from its files alone: what the moments, the weights, the moving averages and the
logged rates of successive checkpoints say of the betas, the decay, the clipping, the momentum and the schedule."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from trainer_run import metrics

from fastmim.arguments import parse_train
from fastmim.engine.base import MODEL_FILE, OPTIMIZER_FILE
from fastmim.methods import base

EPOCHS, STEPS_PER_EPOCH, LR = 4, 4, 1e-3
STEPS = EPOCHS * STEPS_PER_EPOCH
# The recipe, on 36 small images: what is not a size comes from the preset.
SMALL = [
    "--preset", "paper", "--model", "vit_pico", "--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--precision",
    "fp32", "--workers", "0", "--epochs", str(EPOCHS), "--warmup", "1ep", "--lr", str(LR), "--device", "cpu", "--log-every", "1",
    "--save-every", "1", "--keep", str(STEPS), "--knn-every", "0", "--reconstruct-every", "0",
]  # fmt: skip


class Recipe(NamedTuple):
    """The rate at the start and the end as shares of the peak; falls_at: the share of the run where it falls to a tenth."""

    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = math.inf
    start: float = 0.0
    end: float = 0.0
    falls_at: float | None = None
    sizes: tuple[str, ...] = ()

    def rate(self, step: int) -> float:
        if step < STEPS_PER_EPOCH:
            return LR * (self.start + (1 - self.start) * step / STEPS_PER_EPOCH)
        if self.falls_at is not None:
            return LR * (0.1 if step >= self.falls_at * STEPS else 1)
        share = (step - STEPS_PER_EPOCH) / (STEPS - STEPS_PER_EPOCH)
        return LR * (self.end + (1 - self.end) * (1 + math.cos(math.pi * share)) / 2)


def decoder(method: str) -> tuple[str, ...]:
    return f"--{method}.decoder-width", "32", f"--{method}.decoder-heads", "2"


# specs: PRETRAIN.md of MAE; CMAE's, CAE's, SimMIM's and SDMAE's configurations; MixedAE takes MAE's.
RECIPES = {
    "mae": Recipe(sizes=decoder("mae")),
    "cmae": Recipe(start=1e-4, sizes=(*decoder("cmae"), "--cmae.head-hidden", "64")),
    "cae": Recipe(betas=(0.9, 0.999), clip=3.0, end=1e-5 / 1.5e-3),
    "mixedae": Recipe(sizes=decoder("mixedae")),
    "icmae": Recipe(sizes=("--icmae.head-hidden", "64")),
    "simmim": Recipe(betas=(0.9, 0.999), clip=5.0, start=5e-3, falls_at=7 / 8, sizes=("--simmim.layer-scale", "1")),
}
DECAY = 0.05
FILES = MODEL_FILE, OPTIMIZER_FILE


def momentum(method: str, step: int) -> float:
    """CMAE's code: constant. ICMAE: MoCo v3's rise by half a cosine."""
    return {"cmae": 0.996, "icmae": 1 - 0.01 * (1 + math.cos(math.pi * step / STEPS)) / 2}[method]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_of_the_paper_preset_takes_its_numbers(images, server, tmp_path, name):
    recipe, out = RECIPES[name], tmp_path / "run"
    flags = ["--method", name, "--data", str(images / "train"), *SMALL, *recipe.sizes, "--out", str(out)]
    server.run(["train", *flags])
    logged = [r for r in metrics(out) if "loss" in r]
    assert [r["lr"] for r in logged] == pytest.approx([recipe.rate(step) for step in range(STEPS)], rel=1e-9, abs=1e-15)

    config = parse_train(flags)
    method = base.build(name, config.model_spec(), config.options, 0)
    names = {p: n for n, p in method.named_parameters()}
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    saved = [out / "checkpoints" / f"step-{step:07d}" for step in range(1, STEPS + 1)]
    states = [[{n: t.double() for n, t in load_file(f / file).items()} for file in FILES] for f in saved]
    for step, ((before, old), (after, new)) in enumerate(pairwise(states), start=1):
        squares = 0.0
        for n, p in trained.items():
            gradient = (new[f"exp_avg.{n}"] - recipe.betas[0] * old[f"exp_avg.{n}"]) / (1 - recipe.betas[0])
            squares += gradient.square().sum().item()
            second = recipe.betas[1] * old[f"exp_avg_sq.{n}"] + (1 - recipe.betas[1]) * gradient**2
            largest = (1 - recipe.betas[1]) * gradient.square().max().item()
            torch.testing.assert_close(new[f"exp_avg_sq.{n}"], second, rtol=1e-3, atol=1e-3 * largest + 1e-20)
            mean = new[f"exp_avg.{n}"] / (1 - recipe.betas[0] ** (step + 1))
            square = new[f"exp_avg_sq.{n}"] / (1 - recipe.betas[1] ** (step + 1))
            decay = 0.0 if method.no_decay(n, p) else DECAY
            rate = recipe.rate(step)
            expected = before[n] * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(after[n], expected, rtol=2.4e-7, atol=2e-5 * rate)
        assert math.sqrt(squares) == pytest.approx(min(logged[step]["grad_norm"], recipe.clip), rel=1e-3)
        for pair in method.ema_pairs():
            kept = momentum(name, step)
            expected = kept * before[names[pair.target]] + (1 - kept) * after[names[pair.online]]
            torch.testing.assert_close(after[names[pair.target]], expected, rtol=2.4e-7, atol=1e-9)
    assert recipe.clip == math.inf or max(r["grad_norm"] for r in logged[1:]) > recipe.clip
    assert bool(method.ema_pairs()) == (name in ("cmae", "icmae"))
