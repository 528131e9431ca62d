"""Finds in a model built elsewhere what this package's ops can compute: norms, patch embeddings, MLPs, blocks, losses."""

import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .gather import gather_tokens
from .layer_norm import add_layer_norm
from .nn import linear_gelu, project_patches
from .pixel_loss import masked_pixel_loss


class Candidate(NamedTuple):
    part: str
    method: str  # the name of the method to replace
    replacement: Callable[..., object] | None  # the new method; None if there is none
    reason: str = ""  # why there is none
    bypassed: tuple[str, ...] = ()  # names of children that the new method does not call
    probe: tuple[int, ...] = ()  # shape of the input for the comparison; (): no comparison


def original(module: nn.Module, method: str = "forward") -> Callable[..., object]:
    """The method that was replaced."""
    return types.MethodType(getattr(type(module), method), module)


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
    """Masked patches per image: on a GPU, where reading them would wait for it, from the mask ratio, if the model has one.

    facebookresearch/mae has none, its ratio being an argument of ``forward``; a graph, which cannot wait, takes its default.
    """
    ratio = getattr(config, "mask_ratio", None)
    if ratio is None and mask.is_cuda and torch.cuda.is_current_stream_capturing():
        ratio = 0.75
    if ratio is None or mask.device.type == "cpu":
        return int(mask[0].sum())
    return mask.shape[1] - int(mask.shape[1] * (1 - ratio))
