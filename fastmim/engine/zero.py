"""DeepSpeed ZeRO, stages 0-3. The only file that imports deepspeed.

The configuration is lean (throughput timer off, own clipping at stage 0, DDP inside instead of DeepSpeed's own
reduction there): measured on a CPU, stage 0 then costs what plain torch costs, against 1.05-1.3 times that with the
defaults. Parameters stay fp32 at every stage and the method runs under autocast: DeepSpeed's `bf16.enabled` starts
Adam one step late at stage 0, and its averages in bf16 would stall the EMA.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from fastmim_kernels import ema_update
from fastmim_pipelines.spec import Batch
from torch import Tensor, nn

from fastmim.config import ConfigError
from fastmim.contrast import Representations, Rest
from fastmim.dist import is_main, rank, start, world_size
from fastmim.ema import EmaPair
from fastmim.engine.base import MODEL_FILE, OPTIMIZER_FILE, EngineSpec, Precise, Put, Source, StepInfo
from fastmim.engine.ddp import data_parallel, release_group
from fastmim.optim import MOMENTS, adamw, clip_gradients


def import_deepspeed(device: torch.device):
    """deepspeed, told which accelerator to use, and not to compile its shared-memory op for CPUs.

    That op is built at every first start (37 s, and it needs a compiler), and training never calls it.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # It knows optimizers by their exact type; ours is torch's AdamW with other arithmetic behind the same state.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if get_accelerator().device_name() != device.type:
        raise ConfigError(
            f"DeepSpeed accelerator: expected {device.type}, got {get_accelerator().device_name()}; "
            f"set DS_ACCELERATOR={device.type}"
        )
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# DeepSpeed collects gradients in a buffer of this many numbers before it reduces them. This is its default, 2 GB of fp32
# on each device: more than all 16 bytes per parameter of ViT-B (1.4 GB).
MOST_IN_BUCKET = 500_000_000


def bucket_numbers(sizes: Iterable[int]) -> int:
    """The whole gradient of a model that is smaller than DeepSpeed's default: as many collectives, and no idle memory.

    A smaller buffer would save more (all of the gradient adds a quarter to 16 bytes per parameter), but is emptied more
    often, and what stages 1 and 2 cost over plain data parallelism on models of this size is Python, not bandwidth.

    Args:
        sizes: numbers in each trained parameter.
    """
    return min(MOST_IN_BUCKET, sum(sizes))


def deepspeed_config(spec: EngineSpec, sizes: Iterable[int]) -> dict:
    """DeepSpeed's configuration, derived from ours.

    Args:
        sizes: numbers in each trained parameter.
    """
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulate,
        "gradient_clipping": (spec.clip or 0.0) if spec.zero_stage else 0.0,
        "zero_optimization": {
            "stage": spec.zero_stage,
            # The default adds the bias after the product, one more rounding: losses then differ between stages.
            "memory_efficient_linear": False,
            # With it stages 1 and 2 sum as much, out of one more copy of the gradient and back into it.
            "reduce_scatter": spec.zero_stage == 3,
            "reduce_bucket_size": bucket_numbers(sizes),
            **_offload(spec),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 2**62,
    }


def _offload(spec: EngineSpec) -> dict:
    kept = {"device": "cpu", "pin_memory": spec.device.type == "cuda"}
    what = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(what[spec.zero_offload], kept)


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
            model=model, optimizer=optimizer, config=deepspeed_config(spec, [p.numel() for p in self.trained])
        )
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False
        self.micro_steps = 0
        self.applied = torch.ones((), dtype=torch.bool, device=self.device)

    # -- a step ------------------------------------------------------------------------------------------------

    def _synchronized(self):
        is_last = self.micro_steps == self.spec.accumulate - 1
        return self.model.no_sync() if self.has_ddp and not is_last else nullcontext()

    def forward(self, batch: Batch, rng: Tensor, *rest: Rest):
        with self._synchronized():
            return self.engine(batch, rng, *rest)

    def represent(self, batch: Batch, rng: Tensor) -> Representations:
        return self.precise.represent(batch, rng)

    def backward(self, loss: Tensor) -> None:
        with self._synchronized():
            self.engine.backward(loss)
        self.micro_steps += 1
        if self.micro_steps < self.spec.accumulate:
            self.engine.step()  # counts the micro-batch; updates nothing

    def step(self, pairs: Sequence[EmaPair] = (), momentum: float | Tensor = 1.0) -> StepInfo:
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
        self._average(pairs, momentum)
        return StepInfo(self.applied, norm)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """torch's AdamW inside DeepSpeed's wrapper."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def _average(self, pairs: Sequence[EmaPair], momentum: float | Tensor) -> None:
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

        # With offload the two may be in different memories.
        places = [t.ds_tensor.device for t in targets]
        shards = [safe_get_local_fp32_param(p).flatten().to(place) for p, place in zip(online, places)]
        ema_update(
            [t.ds_tensor.data.flatten()[: s.numel()] for t, s in zip(targets, shards)], shards, kept.to(places[0])
        )
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

    def close(self) -> None:
        if self.has_ddp:
            release_group(self.model)

    # -- state: by parameter name, the same files as SingleEngine's, whatever the stage and the world -----------

    def _gathered(self, parameters: list[Tensor], *, written: bool = False):
        """Within it, the given parameters are whole on every rank; with `written`, rank 0's changes stay."""
        if self.stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if written else None)

    def save(self, put: Put) -> None:
        # One parameter at a time: where they are sharded, all of them may fit on no device.
        for name, parameter in self.method.named_parameters():
            with self._gathered([parameter]):
                if is_main():
                    put(MODEL_FILE, name, parameter.data)
        if is_main():
            for name, buffer in self._saved_buffers().items():
                put(MODEL_FILE, name, buffer)
        self._link_states()
        step = self._optimizer_step()
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad and step:
                moments = self._moments(parameter)
                if is_main():
                    for key, value in zip(MOMENTS, moments):
                        put(OPTIMIZER_FILE, f"{key}.{name}", value)
                    put(OPTIMIZER_FILE, f"step.{name}", torch.tensor(float(step)))

    @torch.no_grad()
    def load(self, source: Source) -> None:
        parameters, buffers = dict(self.method.named_parameters()), self._saved_buffers()
        source.expect(MODEL_FILE, [*parameters, *buffers])
        for name, parameter in parameters.items():
            like = torch.empty(self._shape(parameter), dtype=parameter.dtype, device="meta")
            value = source.get(MODEL_FILE, name, like)
            with self._gathered([parameter], written=True):
                if self.stage < 3 or is_main():
                    parameter.data.copy_(value)
            if self.stage and parameter.requires_grad:
                self._set_master(parameter, value)
        for name, buffer in buffers.items():
            buffer.copy_(source.get(MODEL_FILE, name, buffer))
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        if source.names.get(OPTIMIZER_FILE):
            self._load_optimizer(source)

    def _load_optimizer(self, source: Source) -> None:
        base, made, count = self.base_optimizer, False, None
        for name, parameter in self.method.named_parameters():
            if not parameter.requires_grad:
                continue
            step = source.get(OPTIMIZER_FILE, f"step.{name}", torch.zeros(()))
            like = torch.empty(self._shape(parameter), device="meta")
            moments = {key: source.get(OPTIMIZER_FILE, f"{key}.{name}", like) for key in MOMENTS}
            if self.stage == 0:
                # One count for all, see AdamW.
                count = step if count is None else count
                base.state[parameter] = {"step": count, **moments}
                continue
            if not made:
                self._make_states(float(step))
                made = True
            self._set_moments(parameter, moments)
        if self.stage:
            # DeepSpeed steps group by group: a count that they shared would count each.
            for state in base.state.values():
                state["step"] = torch.full_like(state["step"], float(step))

    def _saved_buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.method.named_parameters()}
        return {name: t for name, t in self.method.state_dict().items() if name not in parameters}

    def _shape(self, parameter: Tensor) -> torch.Size:
        """Of the whole parameter."""
        return parameter.ds_shape if self.stage == 3 else parameter.shape

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

    def _set_master(self, parameter: Tensor, value: Tensor) -> None:
        """Sets the fp32 copy that stages 1-3 step on."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)

    def _set_moments(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, key)

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
        # With offload, DeepSpeed keeps a buffer for the gradient there.
        saved = [(g["lr"], g["weight_decay"], [flat.grad for flat in g["params"]]) for g in base.param_groups]
        for group in base.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
            for flat in group["params"]:
                flat.grad = torch.zeros_like(flat)
        base.step()
        for group, (lr, weight_decay, gradients) in zip(base.param_groups, saved):
            group["lr"], group["weight_decay"] = lr, weight_decay
            for flat, gradient in zip(group["params"], gradients):
                flat.grad = gradient
        self._link_states()


ENGINE = ZeroEngine
