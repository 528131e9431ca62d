"""Steps on other packages' modules, where those are installed: timm, transformers, lightly; each with the weights, images
and masks of ours, so that its losses can be compared.

They get what their users would give them: torch's fused attention and fused AdamW, under autocast.
"""

import importlib
import re
import sys
import warnings
from abc import ABC, abstractmethod
from functools import partial

import official
import torch
from machine import DEVICE
from providers import OfficialStyle
from torch import Tensor, nn

from fastmim.blocks import NORM_EPS, Block


def missing(package: str) -> str:
    """'' if a package can be imported, else why not."""
    # torchvision built for CUDA does not load its ops beside a torch without; the models need none of them.
    for _ in range(3):
        try:
            importlib.import_module("torchvision")
        except ModuleNotFoundError:
            break
        except RuntimeError as e:
            absent = re.search(r"operator (torchvision::\w+) does not exist", str(e))
            if absent is None:
                return f"torchvision does not import: {e}"
            torch.library.define(absent[1], "() -> ()")
            for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[name]
    try:
        importlib.import_module(package)
    except ImportError as e:
        name = package.partition(".")[0]
        return f"{name} is not installed" if getattr(e, "name", "") == name else f"{name} does not import: {e}"
    return ""


# ---- timm's blocks between the official code's own parts: what the official models are made of


def timm_block(block: Block) -> nn.Module:
    """A block of timm that shares the parameters of one of ours."""
    from timm.models.vision_transformer import Block as TimmBlock

    width = block.fc2.out_features
    theirs = TimmBlock(width, block.attn.heads, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=NORM_EPS))
    for name in [name for name, _ in theirs.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(owner), leaf, block.get_parameter(name.replace("mlp.", "")))
    return theirs


class OfficialOnTimm(official.Official):
    def __init__(self, method: nn.Module):
        super().__init__(method)
        stacks = {name: part for name, part in method.named_modules() if name.endswith("blocks")}
        self.stacks = nn.ModuleList(nn.ModuleList(map(timm_block, part)) for part in stacks.values())
        self.of = {id(part): stack for part, stack in zip(stacks.values(), self.stacks)}

    def blocks(self, parts: nn.ModuleList, x: Tensor) -> Tensor:
        for block in self.of[id(parts)]:
            x = block(x)
        return x


class Timm(OfficialStyle):
    needs, fused_optimizer = "timm.models.vision_transformer", True

    def network(self) -> nn.Module:
        return OfficialOnTimm(self.method)


# ---- models with parameters of their own


def published(method: nn.Module) -> dict[str, Tensor]:
    """The weights of MAE under the names of facebookresearch/mae's models_mae.py."""
    e, d, m = method.encoder, method.decoder, method.model
    p = m.patch_size
    found = {
        "cls_token": e.cls_token, "pos_embed": e.position[None], "mask_token": d.mask_token,
        "patch_embed.proj.weight": e.patch_embed.weight.view(-1, p, p, m.in_chans).permute(0, 3, 1, 2),
        "patch_embed.proj.bias": e.patch_embed.bias, "decoder_pos_embed": d.position[None],
    }  # fmt: skip
    for prefix, part in (("", e), ("decoder_", d)):
        for name, parameter in part.named_parameters():
            if name.startswith(("blocks.", "norm.")) or (part is d and name.startswith(("embed.", "pred."))):
                found[prefix + name.replace(".fc", ".mlp.fc")] = parameter
    return {name: tensor.detach() for name, tensor in found.items()}


class Own(OfficialStyle, ABC):
    """A model of another package that starts from our weights."""

    takes, fused_optimizer, reads_loss = ("mae",), True, False

    def network(self) -> nn.Module:
        model = self.build().to(DEVICE)
        values = self.renamed(published(self.method))
        unknown = sorted({name for name, _ in model.named_parameters()} - set(values))
        if unknown:
            raise LookupError(f"this version of {self.needs.partition('.')[0]} has other names: {unknown[0]}")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(values[name])
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return model

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return self.parameters

    @abstractmethod
    def build(self) -> nn.Module:
        """The model."""

    @abstractmethod
    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `published` gives under the model's names."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The loss."""


class HuggingFace(Own):
    needs = "transformers.models.vit_mae.modeling_vit_mae"
    # Of published weights to transformers' (5.x).
    NAMES = (
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"), ("^cls_token", "vit.embeddings.cls_token"),
        ("^pos_embed", "vit.embeddings.position_embeddings"), ("^norm", "vit.layernorm"), ("^blocks", "vit.layers"),
        ("^decoder_blocks", "decoder.decoder_layers"), ("^(mask_token|decoder_)", r"decoder.\1"), ("attn.proj", "attention.o_proj"),
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
    )  # fmt: skip

    def build(self) -> nn.Module:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        m, e, o = self.method.model, self.method.encoder, self.options
        return ViTMAEForPreTraining(ViTMAEConfig(
            hidden_size=e.width, num_hidden_layers=len(e.blocks), num_attention_heads=e.blocks[0].attn.heads,
            intermediate_size=4 * e.width, image_size=m.image_size[0], patch_size=m.patch_size, layer_norm_eps=NORM_EPS,
            mask_ratio=o.mask_ratio, norm_pix_loss=True, decoder_hidden_size=o.decoder_width,
            decoder_num_hidden_layers=o.decoder_depth, decoder_num_attention_heads=o.decoder_heads,
            decoder_intermediate_size=4 * o.decoder_width, attn_implementation="sdpa",
        ))  # fmt: skip

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in weights.items():
            for pattern, new in self.NAMES:
                name = re.sub(pattern, new, name)
            if ".attn.qkv." in name:
                for part, piece in zip("qkv", tensor.chunk(3)):
                    found[name.replace("attn.qkv", f"attention.{part}_proj")] = piece
            else:
                found[name] = tensor
        return found

    def forward(self) -> Tensor:
        with self.autocast:
            return self.model(self.views[0], noise=self.noise).loss


class LightlyMAE(nn.Module):
    """MAE as lightly's example puts its modules together. Source: examples/pytorch/mae.py."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, patch_size: int):
        super().__init__()
        self.encoder, self.decoder, self.patch_size = encoder, decoder, patch_size

    def forward(self, images: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        from lightly.models.utils import get_at_index, normalize_mean_var, patchify, repeat_token, set_at_index

        # The class token has index 0.
        cls = ids_keep.new_zeros(len(ids_keep), 1)
        keep, masked = torch.cat([cls, ids_keep + 1], dim=1), ids_masked + 1
        embedded = self.decoder.embed(self.encoder.encode(images, idx_keep=keep))
        tokens = repeat_token(self.decoder.mask_token, (len(images), self.encoder.sequence_length))
        tokens = set_at_index(tokens, keep, embedded.type_as(tokens))
        pred = self.decoder.predict(get_at_index(self.decoder.decode(tokens), masked))
        target = normalize_mean_var(get_at_index(patchify(images, self.patch_size), ids_masked), dim=-1)
        return nn.functional.mse_loss(pred, target)


class Lightly(Own):
    needs = "lightly.models.modules"

    def build(self) -> nn.Module:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        m, e, o = self.method.model, self.method.encoder, self.options
        with warnings.catch_warnings(action="ignore"):
            decoder = MAEDecoderTIMM(
                num_patches=m.num_patches, patch_size=m.patch_size, in_chans=m.in_chans, embed_dim=e.width,
                decoder_embed_dim=o.decoder_width, decoder_depth=o.decoder_depth, decoder_num_heads=o.decoder_heads,
            )  # fmt: skip
        encoder = VisionTransformer(
            img_size=m.image_size, patch_size=m.patch_size, in_chans=m.in_chans, embed_dim=e.width, depth=len(e.blocks),
            num_heads=e.blocks[0].attn.heads, num_classes=0, global_pool="token", norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
        )  # fmt: skip
        model = LightlyMAE(MaskedVisionTransformerTIMM(encoder), decoder, m.patch_size)
        # Tokens that are masked never enter the encoder: this one would get no gradient.
        model.encoder.mask_token.requires_grad_(False)
        return model

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"encoder.mask_token": torch.zeros(())}
        for name, tensor in weights.items():
            of_decoder = name == "mask_token" or name.startswith("decoder_")
            found[("decoder." if of_decoder else "encoder.vit.") + name] = tensor
        return found

    def forward(self) -> Tensor:
        order = torch.argsort(self.noise, dim=1)
        keep = self.method.mask.num_keep
        with self.autocast:
            return self.model(self.views[0], order[:, :keep], order[:, keep:])
