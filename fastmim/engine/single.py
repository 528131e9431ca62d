"""One process."""

from contextlib import nullcontext
from pathlib import Path

import torch
from fastmim_kernels import ema_update
from fastmim_pipelines.spec import Batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmim.dist import is_main, rank, world_size
from fastmim.ema import EmaPair
from fastmim.engine.base import EngineSpec, Precise, StepInfo
from fastmim.optim import adamw, clip_gradients

MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
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

    def forward(self, batch: Batch, rng: Tensor):
        return self.precise(batch, rng)

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

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def ema(self, pairs: list[EmaPair], momentum: float) -> None:
        if pairs:
            kept = torch.where(self.applied, momentum, 1.0)
            ema_update([p.target for p in pairs], [p.online for p in pairs], kept)

    def whole(self):
        return nullcontext()

    def autocast(self):
        return self.precise.autocast()

    def save(self, folder: Path) -> None:
        if is_main():
            save_file({n: t.contiguous() for n, t in self.method.state_dict().items()}, folder / MODEL_FILE)
            tensors = {}
            for name, parameter in self.method.named_parameters():
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}.{name}"] = value.contiguous()
            if self.scaler.is_enabled():
                state = self.scaler.state_dict()
                tensors["scaler.scale"] = torch.tensor(state["scale"])
                tensors["scaler.growth"] = torch.tensor(state["_growth_tracker"])
            save_file(tensors, folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        self.method.load_state_dict(load_file(folder / MODEL_FILE))
        tensors = load_file(folder / OPTIMIZER_FILE)
        for name, parameter in self.method.named_parameters():
            if f"step.{name}" in tensors:
                state = {key: tensors[f"{key}.{name}"].to(self.device) for key in ("step", *MOMENTS)}
                self.optimizer.state[parameter] = state
        if self.scaler.is_enabled() and "scaler.scale" in tensors:
            state = self.scaler.state_dict()
            state["scale"], state["_growth_tracker"] = tensors["scaler.scale"].item(), tensors["scaler.growth"].item()
            self.scaler.load_state_dict(state)


ENGINE = SingleEngine
