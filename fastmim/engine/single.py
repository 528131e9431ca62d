"""One process."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from fastmim_kernels import ema_update
from fastmim_kernels.dense import rounded_weights
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn

from fastmim.contrast import Representations, Rest
from fastmim.dist import is_main, rank, world_size
from fastmim.ema import EmaPair
from fastmim.engine.base import MODEL_FILE, OPTIMIZER_FILE, EngineSpec, Precise, Put, Source, StepInfo
from fastmim.optim import MOMENTS, adamw, clip_gradients, clip_scale


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
        # A CPU's products take bf16 weights, and to round them takes longer than some products: the step does it.
        is_wanted = spec.precision == "bf16" and self.device.type == "cpu"
        matrices = [m.weight for m in self.method.modules() if is_wanted and isinstance(m, nn.Linear)]
        self.copies = {w: torch.empty_like(w, dtype=torch.bfloat16) for w in matrices if w.requires_grad}
        self.versions: list[int] = []

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        with self.rounded():
            return self.precise(batch, rng, *rest)

    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        with self.rounded():
            return self.precise.represent(batch, rng)

    @torch.no_grad()
    def rounded(self) -> AbstractContextManager[None]:
        """Within it, linear layers find their weights in bf16, as the last step left them."""
        if not self.copies:
            return nullcontext()
        # Whatever else wrote to the weights, in place, counted their versions up.
        versions = [p._version for p in self.copies]
        if versions != self.versions:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self.versions = versions
        return rounded_weights(self.copies)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.spec.accumulate).backward()

    def step(self, pairs: Sequence[EmaPair] = (), momentum: float | Tensor = 1.0) -> StepInfo:
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, None)
        # Read on the device, with no sync.
        applied = norm.isfinite()
        followers, others = {}, []
        for pair in pairs:
            is_stepped = pair.online.grad is not None and pair.online not in followers
            followers.update({pair.online: pair.target}) if is_stepped else others.append(pair)
        self.optimizer.step(
            grad_scale=clip_scale(norm, self.spec.clip), applied=applied, targets=followers, momentum=momentum,
            copies=self.copies,
        )  # fmt: skip
        if others:
            kept = torch.where(applied, torch.as_tensor(momentum, dtype=torch.float64), 1.0)
            ema_update([p.target for p in others], [p.online for p in others], kept)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(applied, norm)

    def discard(self) -> Tensor:
        """Clears the gradients without a step; their norm."""
        norm = clip_gradients(self.parameters, None)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

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
        # Parameters with equal counts share one, as in a run from the start.
        counts: dict[float, Tensor] = {}
        for name, parameter in self.method.named_parameters():
            if f"step.{name}" in names:
                like = {"step": zero, **dict.fromkeys(MOMENTS, parameter)}
                state = {key: source.get(OPTIMIZER_FILE, f"{key}.{name}", t) for key, t in like.items()}
                state["step"] = counts.setdefault(state["step"].item(), state["step"])
                self.optimizer.state[parameter] = state
        if self.scaler.is_enabled() and "scaler.scale" in names:
            state = self.scaler.state_dict()
            state["scale"] = source.get(OPTIMIZER_FILE, "scaler.scale", zero).item()
            state["_growth_tracker"] = source.get(OPTIMIZER_FILE, "scaler.growth", zero.long()).item()
            self.scaler.load_state_dict(state)

    def close(self) -> None:
        """Nothing to end."""


ENGINE = SingleEngine
