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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .gather import gather_tokens
from .layer_norm import add_layer_norm
from .nn import is_observed, linear_gelu, project_patches
from .pixel_loss import masked_pixel_loss

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


class Candidate(NamedTuple):
    part: str
    method: str  # the name of the method to replace
    replacement: Callable[..., object] | None  # the new method; None if there is none
    reason: str = ""  # why there is none
    bypassed: tuple[str, ...] = ()  # names of children that the new method does not call
    probe: tuple[int, ...] = ()  # shape of the input for the comparison; (): no comparison


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


def original(module: nn.Module, method: str = "forward") -> Callable[..., object]:
    """The method that was replaced."""
    return types.MethodType(getattr(type(module), method), module)


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
    probe = torch.linspace(-9, 9, count, dtype=torch.float64).sin().mul(4).view(candidate.probe)
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


def candidates(module: nn.Module) -> Iterator[Candidate]:
    """Everything about the module itself, not its children, that might be replaced."""
    for find in (find_layer_norm, find_patch_embed, find_mlp, find_feed_forward, find_block, find_loss):
        candidate = find(module)
        if candidate is not None:
            yield candidate


def find_layer_norm(module: nn.Module) -> Candidate | None:
    if not isinstance(module, nn.LayerNorm):
        return None
    is_timm = type(module).__name__ == "LayerNorm" and type(module).__module__.startswith("timm.layers")
    if type(module).forward is not nn.LayerNorm.forward and not is_timm:
        return Candidate("layer_norm", "forward", None, f"{type(module).__name__} has a forward of its own")
    if module.weight is None:
        return Candidate("layer_norm", "forward", None, "it has no weight")
    if len(module.normalized_shape) != 1:
        return Candidate("layer_norm", "forward", None, "it normalizes over several dimensions")

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2:
            return original(self)(x)
        return add_layer_norm(x, None, self.weight, self.bias, eps=self.eps)

    return Candidate("layer_norm", "forward", forward, probe=(3, module.normalized_shape[0]))


def find_patch_embed(module: nn.Module) -> Candidate | None:
    if type(module) is not nn.Conv2d or module.stride != module.kernel_size or max(module.stride) == 1:
        return None
    size = module.stride[0]
    plain = (module.dilation, module.groups, module.padding) == ((1, 1), 1, (0, 0))
    if not plain or module.stride != (size, size):
        return Candidate("patch_embed", "forward", None, "its patches are not square, or it pads, dilates or groups")

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % size or x.shape[3] % size:
            return original(self)(x)
        out = project_patches(x, self.weight, self.bias)
        return out.transpose(1, 2).unflatten(2, (x.shape[2] // size, x.shape[3] // size))

    return Candidate("patch_embed", "forward", forward, probe=(1, module.in_channels, 2 * size, size))


# Names of the children of an MLP, in the order in which they are called: linear layer, activation, all others.
MLPS = (
    ("fc1", "act", "drop1", "norm", "fc2", "drop2"),  # timm
    ("fc1", "activation_fn", "fc2"),  # transformers
    ("fc1", "activation", "fc2"),  # transformers, DINOv2 until version 4
    ("dense", "intermediate_act_fn"),  # transformers, ViT until version 4
    ("0", "1", "2", "3", "4"),  # torchvision
)


def find_mlp(module: nn.Module) -> Candidate | None:
    children = dict(module.named_children())
    names = next((names for names in MLPS if set(names) == set(children)), None)
    if names is None or type(children[names[0]]) is not nn.Linear:
        return None
    first, activation, *others = names

    def forward(self, x: Tensor) -> Tensor:
        linear = getattr(self, first)
        x = linear_gelu(x, linear.weight, linear.bias)
        for name in others:
            x = getattr(self, name)(x)
        return x

    return Candidate("mlp", "forward", forward, bypassed=(first, activation), probe=(3, children[first].in_features))


def find_feed_forward(module: nn.Module) -> Candidate | None:
    """The MLP of ``nn.TransformerEncoderLayer``, a method of the layer."""
    if type(module) is not nn.TransformerEncoderLayer:
        return None

    # Named as the method: pickle looks it up by that name.
    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = linear_gelu(x, self.linear1.weight, self.linear1.bias)
        return self.dropout2(self.linear2(self.dropout(hidden)))

    probe = (1, 3, module.linear1.in_features)
    return Candidate("mlp", "_ff_block", _ff_block, bypassed=("linear1",), probe=probe)


class Seam(NamedTuple):
    """Names of the children of a pre-norm block; "" where it has none of the kind."""

    norm1: str
    attention: str
    dropout: str
    scale: str  # layer scale of the attention
    drop_path: str
    norm2: str
    mlp: str
    after: tuple[str, ...]  # called on the MLP's result, in this order


SEAMS = (
    Seam("norm1", "attn", "", "ls1", "drop_path1", "norm2", "mlp", ("ls2", "drop_path2")),  # timm
    Seam("ln_1", "self_attention", "dropout", "", "", "ln_2", "mlp", ()),  # torchvision
    Seam("layernorm_before", "attention", "dropout", "", "", "layernorm_after", "mlp", ("dropout",)),  # transformers
    # DINOv2
    Seam("norm1", "attention", "", "layer_scale1", "drop_path", "norm2", "mlp", ("layer_scale2", "drop_path")),
)


def find_block(module: nn.Module) -> Candidate | None:
    children = dict(module.named_children())
    seam = next((s for s in SEAMS if {n for n in (*s[:-1], *s.after) if n} == set(children)), None)
    if seam is None or not isinstance(children[seam.norm2], nn.LayerNorm):
        return None
    norm = children[seam.norm2]
    scale = None if not seam.scale else layer_scale(children[seam.scale])
    if find_layer_norm(norm).replacement is None or scale is NotImplemented:
        return Candidate("block", "forward", None, "its norm or its layer scale is of an unknown kind")

    def attend(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        attention = getattr(self, seam.attention)
        if isinstance(attention, nn.MultiheadAttention):
            return attention(x, x, x, need_weights=False)[0]
        out = attention(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        branch = attend(self, getattr(self, seam.norm1)(x), args, kwargs)
        if seam.dropout:
            branch = getattr(self, seam.dropout)(branch)
        norm = getattr(self, seam.norm2)
        gamma = layer_scale(getattr(self, seam.scale)) if seam.scale else None
        rows = None
        if seam.drop_path and self.training and not isinstance(getattr(self, seam.drop_path), nn.Identity):
            # Drawn as for the (scaled) branch itself, in its dtype, on which the draws depend: the generator goes on from the
            # same state, and the same images leave the branch out.
            dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
            rows = getattr(self, seam.drop_path)(branch.new_ones((x.shape[0], 1, 1), dtype=dtype)).view(-1)
        y, x = add_layer_norm(
            branch, x, norm.weight, norm.bias, scale=gamma, row_scale=rows, eps=norm.eps, prenorm=True
        )
        y = getattr(self, seam.mlp)(y)
        for name in seam.after:
            y = getattr(self, name)(y)
        return x + y

    bypassed = tuple(name for name in (seam.scale, seam.drop_path, seam.norm2) if name)
    return Candidate("block", "forward", forward, bypassed=bypassed, probe=(1, 3, norm.normalized_shape[0]))


def layer_scale(module: nn.Module) -> Tensor | None:
    """The factors of a layer scale, None for the identity, NotImplemented for anything else."""
    if isinstance(module, nn.Identity):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    return next(iter(parameters.values())) if set(parameters) in ({"gamma"}, {"lambda1"}) else NotImplemented


def find_loss(module: nn.Module) -> Candidate | None:
    config = getattr(module, "config", module)
    if not hasattr(module, "forward_loss"):
        if type(module).__name__ == "ViTMAEForPreTraining":
            return Candidate("loss", "forward", None, "its loss is not a method, but part of its forward")
        return None
    patch_size = getattr(config, "patch_size", None) or getattr(module.patch_embed, "patch_size", None)
    patch_size = patch_size if isinstance(patch_size, int) else patch_size[0]

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor, *args: object) -> Tensor:
        """Mean over the masked patches only. NaN where the images of a batch hide different numbers of patches."""
        count = round_to_count(self, config, mask)
        ids = mask.argsort(dim=1, descending=True, stable=True)[:, :count]
        loss = masked_pixel_loss(
            gather_tokens(pred, ids), images, ids, patch_size, mean=None, std=None, norm=bool(config.norm_pix_loss)
        )
        return torch.where((mask.sum(1) == count).all(), loss, torch.nan)

    return Candidate("loss", "forward_loss", forward_loss)


def round_to_count(module: nn.Module, config: object, mask: Tensor) -> int:
    """Masked patches per image: read on a CPU; on a GPU, where that would wait for it, from the mask ratio."""
    if mask.device.type == "cpu":
        return int(mask[0].sum())
    ratio = getattr(config, "mask_ratio", 0.75)
    return mask.shape[1] - int(mask.shape[1] * (1 - ratio))
