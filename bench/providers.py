"""Ways to take one training step, on the same weights, images and masks: ours, and what needs nothing but torch.

`bench_step.py` names them; peers.py has those of other packages.
"""

import math
import os
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import official
import torch
from fastmim_pipelines import make_loader
from machine import DEVICE

from fastmim import float8
from fastmim.bench import config_of
from fastmim.compiling import compile_blocks
from fastmim.engine import base as engines
from fastmim.graph import StaticStep
from fastmim.memory import micro_batches
from fastmim.methods import base as methods
from fastmim.methods.base import StepOutput
from fastmim.step import StepProgram, to_device

LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)


class Ours:
    """The method in an engine, as the trainer runs it, step by step."""

    counts = True
    """Whether its forward pass can be run by itself, so that what it asks for is counted."""
    reads_loss = False
    """Whether the host waits for the loss of every step."""
    needs = ""
    """The package that it is taken from."""
    takes: tuple[str, ...] = ()
    """Methods that it can take a step of; (): all."""
    has_graph = False
    tolerance = 0.0
    """How far its losses may be from ours, relative, if more than rounding allows."""

    def __init__(self, case: dict):
        config = config_of(case)
        self.precision, self.batch_size, self.options = case["precision"], case["batch_size"], config.options
        self.method = methods.build(case["method"], config.model_spec(), config.options, seed=0).to(DEVICE)
        loader, _ = make_loader("synthetic", self.method.crops, batch_size=self.batch_size, in_chans=3)
        self.batch = to_device(next(iter(loader.epoch(0))), DEVICE)
        self.rng = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        self.pairs, self.momentum = self.method.ema_pairs(), self.method.momentum(0.0)
        self.parts = micro_batches(replace(config, precision=self.precision), self.method, 1, DEVICE)
        self.start()

    def start(self) -> None:
        self.engine = engines.build("single", self.method, engines.EngineSpec(
            device=DEVICE, precision=self.precision, accumulate=self.parts, micro_batch=self.batch_size // self.parts,
            lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, clip=None, zero_stage=0, has_graph=self.has_graph))  # fmt: skip
        self.program = StepProgram(self.method, self.engine, self.parts, contrast_batch="step")

    def prepare(self) -> None:
        """What is not part of a step."""

    def forward(self) -> torch.Tensor:
        """The loss of one micro-batch as large as the batch."""
        return self.engine.forward(self.batch, self.rng).loss

    def finish(self, loss: torch.Tensor) -> None:
        """What follows `forward`."""
        self.engine.backward(loss)
        self.program.update(self.rng, self.momentum)

    def gradient(self) -> list[StepOutput]:
        return self.program.gradient(self.batch, self.rng)

    def step(self) -> torch.Tensor:
        outputs = self.gradient()
        self.program.update(self.rng, self.momentum)
        return torch.stack([out.loss for out in outputs]).mean()


class Plain(Ours):
    """The same on the plain torch ops of the kernel package, the optimizer's among them."""

    reference = partial(patch.dict, os.environ, FASTMIM_KERNELS="reference")

    def start(self) -> None:
        super().start()
        self.engine.copies = {}

    def forward(self) -> torch.Tensor:
        with self.reference():
            return super().forward()

    def finish(self, loss: torch.Tensor) -> None:
        with self.reference():
            super().finish(loss)

    def step(self) -> torch.Tensor:
        with self.reference():
            return super().step()


class Compiled(Ours):
    """`--compile blocks`."""

    counts = False

    def start(self) -> None:
        super().start()
        compile_blocks(self.method)


class Graph(Ours):
    """`--graph on`: the whole step as one CUDA graph, after a few ordinary steps."""

    counts, has_graph = False, True

    def start(self) -> None:
        super().start()
        self.static = StaticStep(self.program)

    def step(self) -> torch.Tensor:
        outputs, _ = self.static(self.batch, self.rng, LR, self.momentum)
        return torch.stack([out.loss for out in outputs]).mean()


class Fp8(Graph):
    """`--fp8 wide`, as a graph."""

    tolerance = 2e-2

    def start(self) -> None:
        float8.check(self.method, "wide", DEVICE, self.precision)
        float8.convert(self.method, "wide")
        super().start()


class Fp8Compiled(Fp8, Compiled):
    """`--fp8 wide --compile blocks`, as a graph."""


class OfficialStyle(Ours):
    """A step as a script of the official codes takes it."""

    reads_loss = True
    takes = ("mae", "cmae")
    fused_optimizer = False
    is_fp32 = False
    """Without autocast, whatever the precision of the case."""

    def start(self) -> None:
        self.model = self.network()
        named = self.trained()
        spared = [p for name, p in named if self.method.no_decay(name, p)]
        decayed = [p for name, p in named if not self.method.no_decay(name, p)]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=self.fused_optimizer or None)
        self.autocast = torch.autocast(
            DEVICE.type, torch.bfloat16, enabled=self.precision != "fp32" and not self.is_fp32
        )

    def network(self) -> torch.nn.Module:
        """(images, second view, noise) -> loss."""
        return official.Official(self.method)

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.method.named_parameters() if p.requires_grad]

    def prepare(self) -> None:
        self.views = official.views(self.method, self.batch, self.rng)
        self.noise = official.order_of(self.method, self.batch, self.rng)

    def forward(self) -> torch.Tensor:
        with self.autocast:
            return self.model(*self.views, self.noise)

    def finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average(self.momentum)
        self.rng[1] += 1

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        for pair in self.pairs:
            pair.target.data = pair.target.data * momentum + pair.online.data * (1.0 - momentum)

    def step(self) -> torch.Tensor:
        loss = self.forward()
        if self.reads_loss and not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        self.finish(loss)
        return loss.detach()


class OfficialFp32(OfficialStyle):
    is_fp32 = True


class Stock(OfficialStyle):
    counts, reads_loss, fused_optimizer, fused_attention = False, False, True, True

    def network(self) -> torch.nn.Module:
        if self.pairs:
            self.targets, self.onlines = [p.target for p in self.pairs], [p.online for p in self.pairs]
        mode = compile_mode()
        network = official.Official(self.method, fused_attention=self.fused_attention)
        return torch.compile(network, dynamic=False, mode=None if mode == "1" else mode)

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        if self.pairs:
            torch._foreach_lerp_(self.targets, self.onlines, 1 - momentum)


class Inductor(Stock):
    """With products and softmax as they are written: on a CPU torch's fused attention trains slower."""

    fused_attention = False


def compile_mode() -> str:
    """FASTMIM_BENCH_COMPILE: 0 leaves `stock` out, 1 takes torch.compile's defaults, else the name of a mode."""
    return os.environ.get("FASTMIM_BENCH_COMPILE", "1")
