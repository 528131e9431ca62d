"""One process."""

from contextlib import nullcontext

import torch
from fastmim_kernels import ema_update
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn

from fastmim.contrast import Representations, Rest
from fastmim.dist import is_main, rank, world_size
from fastmim.ema import EmaPair
from fastmim.engine.base import MODEL_FILE, OPTIMIZER_FILE, EngineSpec, Precise, Put, Source, StepInfo
from fastmim.optim import adamw, clip_gradients

MOMENTS = ("exp_avg", "exp_avg_sq")


class SingleEngine:
    """Plain torch: the truth that the other engines are compared with."""

    def __init__(self, method: nn.Module, spec: EngineSpec):
        self.spec, self.device = spec, spec.device
        self.rank, self.world = rank(), world_size()
        self.method = method.to(self.device)
        self.precise = Precise(self.method, self.device.type, spec.precision)
        self.optimizer = adamw(
            self.method, self.method.no_decay, lr=spec.lr, weight_decay=spec.weight_decay, betas=spec.betas
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=spec.precision == "fp16")
        self.applied = torch.ones((), dtype=torch.bool, device=self.device)

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        return self.precise(batch, rng, *rest)

    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        return self.precise.represent(batch, rng)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.spec.accumulate).backward()

    def step(self) -> StepInfo:
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.spec.clip)
        self.applied = norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # The fused kernel reads this flag on the device: a non-finite gradient changes nothing, with no sync.
            self.optimizer.found_inf = (~self.applied).float()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(self.applied, norm)

    def discard(self) -> Tensor:
        """Clears the gradients without a step; their norm."""
        norm = clip_gradients(self.parameters, None)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            # AdamW asks for "capturable" in a graph; what the fused one does is the same.
            group["lr"], group["capturable"] = lr, isinstance(lr, Tensor) and lr.is_cuda

    def ema(self, pairs: list[EmaPair], momentum: float | Tensor) -> None:
        if pairs:
            kept = torch.where(self.applied, momentum, 1.0)
            ema_update([p.target for p in pairs], [p.online for p in pairs], kept)

    def whole(self):
        return nullcontext()

    def autocast(self):
        return self.precise.autocast()

    def save(self, put: Put) -> None:
        if not is_main():
            return
        for name, tensor in self.method.state_dict().items():
            put(MODEL_FILE, name, tensor)
        for name, parameter in self.method.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                put(OPTIMIZER_FILE, f"{key}.{name}", value)
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            put(OPTIMIZER_FILE, "scaler.scale", torch.tensor(state["scale"]))
            put(OPTIMIZER_FILE, "scaler.growth", torch.tensor(state["_growth_tracker"]))

    @torch.no_grad()
    def load(self, source: Source) -> None:
        weights = self.method.state_dict()
        source.expect(MODEL_FILE, weights)
        for name, tensor in weights.items():
            tensor.copy_(source.get(MODEL_FILE, name, tensor))
        names = source.names.get(OPTIMIZER_FILE, ())
        zero = torch.zeros(())
        for name, parameter in self.method.named_parameters():
            if f"step.{name}" in names:
                like = {"step": zero, **dict.fromkeys(MOMENTS, parameter)}
                state = {key: source.get(OPTIMIZER_FILE, f"{key}.{name}", t) for key, t in like.items()}
                self.optimizer.state[parameter] = state
        if self.scaler.is_enabled() and "scaler.scale" in names:
            state = self.scaler.state_dict()
            state["scale"] = source.get(OPTIMIZER_FILE, "scaler.scale", zero).item()
            state["_growth_tracker"] = source.get(OPTIMIZER_FILE, "scaler.growth", zero.long()).item()
            self.scaler.load_state_dict(state)


ENGINE = SingleEngine
