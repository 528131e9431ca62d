"""Puts this package's ops into a model that was built elsewhere: timm, transformers, torchvision or plain torch.

``apply(model)`` replaces the ``forward`` of single modules, by instance. Weights, state dict keys, classes and modules
stay; ``remove(model)`` takes the replacements away and leaves the model as it was, bit for bit. What is replaced is
recognized by its parts, not by its library, and compared with the original first, on a small input and in float64: a
module that computes anything else is left alone, and the report says so. Attention is left to torch's own, which is
fused.
"""

import copy
import functools
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .nn import is_observed
from .recognition import Candidate, candidates, original

__all__ = ["Entry", "Report", "apply", "remove"]

# In the __dict__ of a module: the names of the methods that were replaced.
MARK = "_fastmim_replaced"
# Method of nn.Module by which nn.DataParallel copies it.
REPLICATE = "_replicate_for_data_parallel"
# Largest difference in float64, in units of max(1, |original|): rounding of another order of summation.
TOLERANCE = 1e-9
ALL_HOOKS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hooks" in name]


class Entry(NamedTuple):
    path: str  # of the module in the model
    part: str  # layer_norm, mlp, patch_embed, block or loss
    reason: str  # why it was left alone; "" if it was replaced


@dataclass
class Report:
    """What ``apply`` did. As a context manager it removes the replacements at its end."""

    model: nn.Module
    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.reason]

    @property
    def skipped(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reason]

    def __str__(self) -> str:
        counts: dict[tuple[str, str], list[str]] = {}
        for path, part, reason in self.entries:
            counts.setdefault((part, f"left alone: {reason}" if reason else "replaced"), []).append(path or "(model)")
        lines = [f"{part:12} {len(paths):3} {what} ({paths[0]}{' ...' * (len(paths) > 1)})"
                 for (part, what), paths in counts.items()]  # fmt: skip
        return "\n".join(lines) or "nothing in this model is known to have a replacement"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        remove(self.model)


def apply(
    model: nn.Module,
    *,
    layer_norm: bool = True,
    mlp: bool = True,
    patch_embed: bool = True,
    block: bool = True,
    loss: bool = True,
    dry_run: bool = False,
) -> Report:
    """Replace what this package has an op for.

    Args:
        model: stays the same object; also in training, after ``torch.compile``, or moved to another device later.
        layer_norm: ``nn.LayerNorm``, and timm's, over one dimension.
        mlp: linear layer and exact GELU, as one op.
        patch_embed: convolutions whose stride is their kernel size, as one matrix product.
        block: in pre-norm blocks, the residual addition (with layer scale and stochastic depth) and the norm after it.
        loss: a method ``forward_loss(images, pred, mask)`` as in facebookresearch/mae.
        dry_run: only report.

    Returns: Report; ``with apply(model):`` removes the replacements at the end. A copy of the model has them, too; a
        pickled model comes back without and can be given them anew.
    """
    wanted = {"layer_norm": layer_norm, "mlp": mlp, "patch_embed": patch_embed, "block": block, "loss": loss}
    report = Report(model)
    for path, module in model.named_modules():
        if is_unpickled(module):
            forget(module)
        for candidate in candidates(module):
            if wanted[candidate.part]:
                reason = obstacle(module, candidate)
                report.entries.append(Entry(path, candidate.part, reason))
                if not reason and not dry_run:
                    replace(module, candidate)
    return report


def remove(model: nn.Module) -> int:
    """Take every replacement away. Returns how many there were."""
    return sum(forget(module) for module in model.modules())


def forget(module: nn.Module) -> int:
    """Take the replacements of one module away. Returns how many there were."""
    methods = module.__dict__.pop(MARK, ())
    for method in (*methods, REPLICATE) if methods else ():
        module.__dict__.pop(method, None)
    return len(methods)


def is_unpickled(module: nn.Module) -> bool:
    """Whether what were replacements are the class's own methods again: pickle keeps no more of a method than its name."""
    return any(is_own(module, method) for method in module.__dict__.get(MARK, ()))


def is_own(module: nn.Module, method: str) -> bool:
    """Whether the method in the module's __dict__ is the one of its class."""
    return getattr(module.__dict__.get(method), "__func__", None) is getattr(type(module), method)


def replace(module: nn.Module, candidate: Candidate) -> None:
    method, replacement = candidate.method, candidate.replacement
    kinds = {name: type(getattr(module, name)) for name in candidate.bypassed}

    # Of the same name: pickle looks a method up by it.
    @functools.wraps(replacement)
    def guarded(self, *args: object, **kwargs: object) -> object:
        # Hooks that came later are called, and adapters that took a child's place (LoRA) are used.
        if any(type(child := getattr(self, name)) is not kind or is_observed(child) for name, kind in kinds.items()):
            return original(self, method)(*args, **kwargs)
        return replacement(self, *args, **kwargs)

    module.__dict__[method] = types.MethodType(guarded if kinds else replacement, module)
    module.__dict__[REPLICATE] = types.MethodType(_replicate_for_data_parallel, module)
    module.__dict__.setdefault(MARK, []).append(method)


def _replicate_for_data_parallel(self) -> nn.Module:
    """Named as the method: pickle looks it up by that name. A replica has weights, and so methods, of its own."""
    replica = original(self, REPLICATE)()
    for name, method in list(vars(replica).items()):
        if isinstance(method, types.MethodType) and method.__self__ is self:
            vars(replica)[name] = types.MethodType(method.__func__, replica)
    return replica


def obstacle(module: nn.Module, candidate: Candidate) -> str:
    """Why the candidate cannot be replaced; "" if it can."""
    if candidate.replacement is None:
        return candidate.reason
    if candidate.method in module.__dict__.get(MARK, ()):
        return "is replaced already"
    # Who replaces a method for a while may leave the class's own one behind (transformers).
    if candidate.method in module.__dict__ and not is_own(module, candidate.method):
        return f"its {candidate.method} was replaced by somebody else"
    bypassed = [getattr(module, name) for name in candidate.bypassed]
    hooked = [type(child).__name__ for child in bypassed if is_observed(child)]
    if hooked:
        return f"{hooked[0]} in it has a hook, which would not be called"
    return difference(module, candidate) if candidate.probe else ""


@torch.no_grad()
def difference(module: nn.Module, candidate: Candidate) -> str:
    """Says how the replacement's result on a small input differs from the original's; "" if it does not."""
    # A device mesh is what distributed tensors have (FSDP2).
    if any(p.is_meta or p.numel() == 0 or hasattr(p, "device_mesh") for p in module.parameters()):
        return "its parameters are elsewhere (meta device, or sharded); build the model first, shard it afterwards"
    count = torch.Size(candidate.probe).numel()
    probe = torch.linspace(-9, 9, count, dtype=torch.float64, device="cpu").sin().mul(4).view(candidate.probe)
    try:
        double = hookless_copy(module).to("cpu", torch.float64).eval()
        # Nothing is compiled for so little.
        with torch.compiler.set_stance("force_eager"):
            truth = getattr(double, candidate.method)(probe)
            got = types.MethodType(candidate.replacement, double)(probe)
    except Exception as e:  # whatever a module raises that somebody else wrote
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        return f"its copy does not run on {candidate.probe} float64 numbers on the CPU, to compare with ({said})"
    if not isinstance(truth, Tensor) or got.shape != truth.shape:
        return "its result has another form than is known of such a module"
    error = float(((got - truth).abs() / truth.abs().clamp_min(1)).max())
    return "" if error <= TOLERANCE else f"it computes something else (differs by {error:.1g})"


def hookless_copy(module: nn.Module) -> nn.Module:
    """A copy, so that no state is touched; without hooks, which would see the probe, or belong to what cannot be copied."""
    hooks = [vars(m)[name] for m in module.modules() for name in ALL_HOOKS if name in vars(m)]
    return copy.deepcopy(module, {id(value): OrderedDict() for value in hooks})
