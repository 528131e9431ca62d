"""DeepSpeed ZeRO, stages 0-3. The only file that imports deepspeed.

The configuration is lean (throughput timer off, own clipping at stage 0, DDP inside instead of DeepSpeed's own
reduction there): measured on a CPU, stage 0 then costs what plain torch costs, against 1.05-1.3 times that with the
defaults. Parameters stay fp32 at every stage and the method runs under autocast: DeepSpeed's `bf16.enabled` starts
Adam one step late at stage 0, and its averages in bf16 would stall the EMA.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from fastmim_kernels import ema_update
from fastmim_pipelines.spec import Batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmim.config import ConfigError
from fastmim.dist import is_main, rank, start, world_size
from fastmim.ema import EmaPair
from fastmim.engine.base import EngineSpec, Precise, StepInfo
from fastmim.engine.ddp import data_parallel
from fastmim.engine.single import MODEL_FILE, MOMENTS, OPTIMIZER_FILE
from fastmim.optim import adamw, clip_gradients


def import_deepspeed(device: torch.device):
    """deepspeed, told which accelerator to use, and not to compile its shared-memory op for CPUs.

    That op is built at every first start (37 s, and it needs a compiler), and training never calls it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device.type:
        raise ConfigError(
            f"DeepSpeed accelerator: expected {device.type}, got {get_accelerator().device_name()}; "
            f"set DS_ACCELERATOR={device.type}"
        )
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(spec: EngineSpec) -> dict:
    """DeepSpeed's configuration, derived from ours."""
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulate,
        "gradient_clipping": (spec.clip or 0.0) if spec.zero_stage else 0.0,
        "zero_optimization": {
            "stage": spec.zero_stage,
            # The default adds the bias after the product, one more rounding: losses then differ between stages.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 2**62,
    }


class ZeroEngine:
    def __init__(self, method: nn.Module, spec: EngineSpec):
        if spec.precision == "fp16":
            raise ConfigError("--precision fp16: expected bf16 or fp32 with --engine zero; use bf16, or --engine ddp")
        self.deepspeed = import_deepspeed(spec.device)
        start(spec.device)
        self.deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.spec, self.device, self.stage = spec, spec.device, spec.zero_stage
        self.rank, self.world = rank(), world_size()
        self.method = method.to(self.device)
        self.precise = Precise(self.method, self.device.type, spec.precision)
        optimizer = adamw(
            self.method, self.method.no_decay, lr=spec.lr, weight_decay=spec.weight_decay, betas=spec.betas
        )
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        # Stage 0 has no overlapped reduction of its own; DDP has.
        self.has_ddp = self.stage == 0 and self.world > 1
        model = self.precise
        if self.has_ddp:
            model = data_parallel(model, self.device)
        self.model = model
        self.engine, self.optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(spec)
        )
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False
        self.micro_steps = 0
        self.applied = torch.ones((), dtype=torch.bool, device=self.device)

    # -- a step ------------------------------------------------------------------------------------------------

    def _synchronized(self):
        is_last = self.micro_steps == self.spec.accumulate - 1
        return self.model.no_sync() if self.has_ddp and not is_last else nullcontext()

    def forward(self, batch: Batch, rng: Tensor):
        with self._synchronized():
            return self.engine(batch, rng)

    def backward(self, loss: Tensor) -> None:
        with self._synchronized():
            self.engine.backward(loss)
        self.micro_steps += 1
        if self.micro_steps < self.spec.accumulate:
            self.engine.step()  # counts the micro-batch; updates nothing

    def step(self) -> StepInfo:
        self.micro_steps = 0
        if self.stage == 0:
            norm = clip_gradients(self.trained, self.spec.clip)
            self.applied = norm.isfinite()
            self.base_optimizer.found_inf = (~self.applied).float()
            self.engine.step()
        else:
            self.engine.step()
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)
            self.applied = norm.isfinite()
        return StepInfo(self.applied, norm)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW inside DeepSpeed's wrapper."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def ema(self, pairs: list[EmaPair], momentum: float) -> None:
        if not pairs:
            return
        kept = torch.where(self.applied, momentum, 1.0)
        targets, online = [p.target for p in pairs], [p.online for p in pairs]
        if self.stage < 3:
            ema_update(targets, online, kept)
            return
        # `.data` of a partitioned parameter is a placeholder. Online and target tensors have equal shapes, hence
        # equal partitions: each rank averages its own.
        from deepspeed.utils import safe_get_local_fp32_param

        shards = [safe_get_local_fp32_param(p).flatten() for p in online]
        ema_update([t.ds_tensor.data.flatten()[: s.numel()] for t, s in zip(targets, shards)], shards, kept)
        # DeepSpeed keeps small parameters gathered between steps: these copies would lag one step behind.
        gathered = [t for t in targets if t.ds_persist]
        if gathered:
            gathered[0].partition(gathered, has_been_updated=False)
            gathered[0].all_gather(gathered)

    def whole(self):
        if self.stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(list(self.method.parameters()))

    def autocast(self):
        return self.precise.autocast()

    # -- state: by parameter name, the same files as SingleEngine's, whatever the stage and the world -----------

    def save(self, folder: Path) -> None:
        with self.whole():
            if is_main():
                model = {n: t.detach().clone().contiguous() for n, t in self.method.state_dict().items()}
                save_file(model, folder / MODEL_FILE)
        tensors = {}
        self._link_states()
        step = self._optimizer_step()
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad and step:
                moments = self._moments(parameter)
                if is_main():
                    tensors |= {f"{key}.{name}": value for key, value in zip(MOMENTS, moments)}
                    tensors[f"step.{name}"] = torch.tensor(float(step))
        if is_main():
            save_file(tensors, folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        model, tensors = load_file(folder / MODEL_FILE), load_file(folder / OPTIMIZER_FILE)
        modifier = {"modifier_rank": 0}
        for name, parameter in self.method.named_parameters():
            value = model.pop(name).to(self.device)
            if self.stage == 3:
                with self.deepspeed.zero.GatheredParameters([parameter], **modifier):
                    if is_main():
                        parameter.data.copy_(value)
            else:
                parameter.data.copy_(value)
        buffers = dict(self.method.named_buffers())
        for name, value in model.items():
            buffers[name].copy_(value)
        steps = {float(v) for n, v in tensors.items() if n.startswith("step.")}
        if steps:
            self._restore_optimizer(tensors, max(steps))
        if self.stage:
            self._copy_masters(load_file(folder / MODEL_FILE))

    def _optimizer_step(self) -> float:
        return max((float(s["step"]) for s in self.base_optimizer.state.values() if "step" in s), default=0.0)

    def _link_states(self) -> None:
        # DeepSpeed links the moments to parameters after the first group's step only (0.19.8): link them all.
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        if self.stage == 0:
            return [self.optimizer.state[parameter][key].detach().clone() for key in MOMENTS]
        from deepspeed.utils import safe_get_full_optimizer_state

        return [safe_get_full_optimizer_state(parameter, key).detach().float().cpu().clone() for key in MOMENTS]

    def _restore_optimizer(self, tensors: dict[str, Tensor], step: float) -> None:
        base = self.base_optimizer
        if self.stage == 0:
            for name, parameter in self.method.named_parameters():
                if f"step.{name}" in tensors:
                    base.state[parameter] = {
                        key: tensors[f"{key}.{name}"].to(self.device) for key in ("step", *MOMENTS)
                    }
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_states(step)
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad:
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, tensors[f"{key}.{name}"].to(self.device), key)
        for state in base.state.values():
            state["step"].fill_(step)

    def _make_states(self, step: float) -> None:
        """Makes the optimizer's lazy state exist, without moving a weight."""
        base = self.base_optimizer
        if self.stage == 3:
            for flat in self.optimizer.fp32_partitioned_groups_flat:
                base.state[flat] = {
                    "step": torch.tensor(step, device=flat.device),
                    **{key: torch.zeros_like(flat) for key in MOMENTS},
                }
            return
        saved = [(group["lr"], group["weight_decay"]) for group in base.param_groups]
        for group in base.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for flat in group["params"]:
                flat.grad = torch.zeros_like(flat)
        base.step()
        for group, (lr, weight_decay) in zip(base.param_groups, saved):
            group["lr"], group["weight_decay"] = lr, weight_decay
            for flat in group["params"]:
                flat.grad = None
        self._link_states()

    def _copy_masters(self, model: dict[str, Tensor]) -> None:
        """Sets the fp32 copies that stages 1-3 step on."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, model[name].to(self.device))
        if self.stage < 3:
            self.optimizer.update_lp_params()


ENGINE = ZeroEngine
