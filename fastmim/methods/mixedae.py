"""MixedAE: mixed autoencoder (Chen, Liu, Hong, Xu, Li, Yeung, CVPR 2023, arXiv 2303.17152).

MAE whose input mixes patches of several images, each at its own position. So that the mixture does not help to
reconstruct across images, every patch has to recognize those of its own image ("homologous"): it attends to the keys
that it rates highest, a contrastive loss on the patch features secures that choice, and a segment embedding tells the
images of a mixture apart.

The authors published no code. Facts without a mark are in the abstract and the introduction. What else a choice rests
on is said at each option: "recalled" is a number remembered from the paper and not verified, "own" is our choice where
no source says anything. All the rest is MAE (arXiv 2111.06377, github.com/facebookresearch/mae).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from fastmim_kernels import mix_patches, partition, patch_contrastive_loss, topk_attention, unmix_tokens
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.blocks import Attend, attention
from fastmim.config import SIZES, ConfigError, ModelSpec
from fastmim.masking import MaskPlan
from fastmim.methods.base import Method, Preset, StepOutput
from fastmim.targets import PixelTarget, Reconstruction
from fastmim.views import random_flip
from fastmim.vit import Decoder, DecoderSpec, Encoder, initialize

PROJECTION_OUT = 256


@dataclass(frozen=True)
class Config:
    """Options of MixedAE. "recalled": remembered from the paper, not verified. "own": no source says anything."""

    members: int = 4
    """Images of a mixture; each shows 1 / members of its patches. Own: with 4, a step costs what MAE's does, as the
    paper's 3 % more implies, and 3/4 of each image are hidden as in MAE."""
    mode: Literal["compose", "full"] = "compose"
    """One mixture per group of images, or as many as members, in which every patch of every image is used once. Own;
    the names are the paper's."""
    homologous: Literal["topk", "oracle", "none"] = "topk"
    """Keys of a patch: those it rates highest, those of its own image (an upper bound that needs the labels), or all
    (naive mixing)."""
    topk: int | None = None
    """Patch keys that a patch keeps, itself included; none: the number of its image's patches. Own, per head."""
    homo_layers: Literal["all", "all_but_first"] | int = "all"
    """Encoder blocks with homologous attention; a number: the last so many. Own."""
    cls_mode: Literal["shared", "none"] = "shared"
    """shared: one class token per mixture, which sees all patches, is a key of all, and goes to each image's decoder;
    none: it stays by itself, so that images meet in no token. Own."""
    use_segments: bool = True
    """Add a learned vector per member to its patches before the first block. Own: its start, N(0, 0.02^2)."""
    contrast_weight: float = 0.1
    """Of the contrastive loss among the patches of a mixture. Recalled."""
    temperature: float = 0.25
    """Of the contrastive loss. Recalled."""
    projection: Literal["none", "mlp"] = "none"
    """Head before the contrastive loss: none, or a layer of the encoder's width, GELU, and one of 256. Own."""
    norm_pix: bool = True
    """Normalize the target per patch. Own: MAE's better setting."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop. Source: MAE, main_pretrain.py; no color jitter (introduction)."""
    decoder_width: int = 512
    """Source: MAE, table 1b."""
    decoder_depth: int = 8
    """Source: MAE, table 1a."""
    decoder_heads: int = 16
    """Source: MAE, models_mae.py."""


class UnmixingDecoder(Decoder):
    """MAE's decoder on every image of a mixture: its own patches, mask tokens in the place of the others'."""

    def __init__(self, model: ModelSpec, spec: DecoderSpec, out_values: int, *, members: int, num_prefix: int):
        super().__init__(model, spec, out_values, num_prefix=num_prefix)
        self.members = members

    def fill(self, tokens: Tensor, src: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
        return unmix_tokens(tokens, mask_token, position, src, self.members, self.num_prefix)

    def places(self, table: Tensor, src: Tensor, count: int) -> Tensor:
        # A mixture shows a patch at every position.
        return table


class MixedAE(Method):
    Config = Config

    def __init__(self, model: ModelSpec, config: Config):
        super().__init__(model)
        self.config = config
        self.layers = _check(model, config)
        self.batch_multiple = config.members
        self.topk = model.num_patches // config.members if config.topk is None else config.topk
        # Tokens that the encoder hands to the decoders beside the patches.
        self.num_prefix = 1 if config.cls_mode == "shared" else 0
        self.crops = (CropSpec(size=model.image_size, scale=config.crop_scale),)
        self.pixels = PixelTarget(model, config.norm_pix)
        self.encoder = Encoder(model)
        width = self.encoder.width
        spec = DecoderSpec(config.decoder_width, config.decoder_depth, config.decoder_heads)
        self.decoder = UnmixingDecoder(
            model, spec, model.patch_values, members=config.members, num_prefix=self.num_prefix
        )
        if config.use_segments:
            self.segments = nn.Embedding(config.members, width)
            nn.init.normal_(self.segments.weight, std=0.02)
        if config.contrast_weight and config.projection == "mlp":
            self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, PROJECTION_OUT))
            initialize(self.projector)

    def forward(self, batch: Batch, rng: Tensor) -> StepOutput:
        members = self.config.members
        if len(batch.ids) % members:
            raise ValueError(
                f"batch: expected a multiple of mixedae.members = {members} images per process and micro-batch, got "
                f"{len(batch.ids)}; change --batch-size or --accumulate."
            )
        flip = random_flip(rng, batch.ids)
        src = self._sources(batch.ids, rng)
        turns = members if self.config.mode == "full" else 1
        return average([self._mixture(batch.crops[0], (src + turn) % members, turn, flip) for turn in range(turns)])

    def _sources(self, ids: Tensor, rng: Tensor) -> Tensor:
        """(G, L) member that supplies each position. Groups are consecutive images: the loader shuffles them anew."""
        members = self.config.members
        return partition(rng, ids[::members], self.model.num_patches, members)

    def _mixture(self, images: Tensor, src: Tensor, turn: int, flip: Tensor) -> StepOutput:
        """Both losses on one mixture per group."""
        config = self.config
        latent, hits = self._encode(images, src, flip=flip)
        plan = mask_plan(src, config.members)
        pred = self.decoder(latent[:, 1 - self.num_prefix :], src, plan.ids_masked)
        loss = pixel = self._pixel_loss(pred, images, plan, turn, flip)
        parts = {"pixel": pixel.detach()}
        if config.contrast_weight:
            features = latent[:, 1:]
            if config.projection == "mlp":
                features = self.projector(features)
            contrast = config.contrast_weight * patch_contrastive_loss(features, src, config.temperature)
            loss, parts["contrast"] = loss + contrast, contrast.detach()
        accuracy = {f"topk_accuracy/{i:02d}": h.float().mean() / self.topk for i, h in zip(self.layers, hits)}
        return StepOutput(loss, parts, accuracy)

    def _encode(self, images: Tensor, src: Tensor, **window: object) -> tuple[Tensor, list[Tensor]]:
        """Latent (G, 1 + L, D), and for each layer with top-K attention (G, heads, L) how many keys were chosen rightly."""
        m = self.model
        patches = mix_patches(images, src, m.patch_size, self.config.members, mean=m.mean, std=m.std, **window)
        segments = self.segments(src) if self.config.use_segments else None
        hits: list[Tensor] = []
        return self.encoder(patches, extra=segments, attend=self._attends(src, hits)), hits

    def _attends(self, src: Tensor, hits: list[Tensor]) -> Sequence[Attend]:
        """The attention of each block; top-K attention appends to `hits` when it is called."""

        def topk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, right = topk_attention(q, k, v, self.topk, num_prefix=self.num_prefix, labels=src)
            hits.append(right)
            return out

        homologous = attention
        if self.config.homologous == "topk":
            homologous = topk
        elif self.config.homologous == "oracle":
            homologous = partial(attention, bias=own_image_bias(src, self.num_prefix))
        attends = [homologous if i in self.layers else attention for i in range(len(self.encoder.blocks))]
        return attends if self.num_prefix else [without_class_token(attend) for attend in attends]

    def _pixel_loss(self, pred: Tensor, images: Tensor, plan: MaskPlan, turn: int, flip: Tensor) -> Tensor:
        """Mean over the patches that the mixture does not show of its images."""
        members, patches = self.config.members, self.model.num_patches
        larger = patches % members
        if larger == 0:
            return self.pixels.loss(pred, images, plan.ids_masked, flip=flip)
        # The partition gives its first members one patch more, each turn the next ones: there the first of ids_masked
        # is not masked.
        order = [(member + turn) % members for member in range(members)]
        total = 0.0
        for chosen, skipped in ((order[:larger], 1), (order[larger:], 0)):
            rows = (pred[:, skipped:], images, plan.ids_masked[:, skipped:], flip)
            p, x, ids, f = (torch.cat([t[member::members] for member in chosen]) for t in rows)
            total = total + self.pixels.loss(p, x, ids, flip=f) * (len(chosen) * ids.shape[1])
        return total / (patches * (members - 1))

    def no_decay(self, name: str, parameter: Tensor) -> bool:
        # As MAE, which decays the tokens; the segments are our choice: they take the part of a position embedding.
        return name.endswith("segments.weight") or super().no_decay(name, parameter)

    def reconstruct(self, images: Tensor, ids: Tensor, rng: Tensor) -> Reconstruction | None:
        """Of whole groups: images beyond the last one are left out."""
        count = len(ids) // self.config.members * self.config.members
        if count == 0:
            return None
        src = self._sources(ids[:count], rng)
        latent, _ = self._encode(images[:count], src)
        pred = self.decoder(latent[:, 1 - self.num_prefix :], src)
        return self.pixels.picture(pred, images[:count], mask_plan(src, self.config.members))


def mask_plan(src: Tensor, members: int) -> MaskPlan:
    """What a mixture shows and hides of each of its images.

    Args:
        src: (G, L) from `partition`.

    Returns:
        For the G * members images: masks that are exact, and ids of as many patches as each image shows at least; where
        an image shows one more, it comes first in ids_masked.
    """
    mask = (src[:, None] != torch.arange(members, device=src.device)[:, None]).flatten(0, 1).float()
    order = mask.argsort(dim=1, stable=True)
    places = torch.arange(src.shape[1], device=src.device).expand_as(order)
    ids_restore = torch.empty_like(order).scatter_(1, order, places)
    share = src.shape[1] // members
    return MaskPlan(order[:, :share].contiguous(), order[:, share:].contiguous(), ids_restore, mask)


def own_image_bias(src: Tensor, num_prefix: int) -> Tensor:
    """(G, 1, P + L, P + L) for the scores: -inf between patches of different images, 0 elsewhere."""
    is_foreign = src[:, None, :, None] != src[:, None, None, :]
    bias = torch.zeros(is_foreign.shape, device=src.device).masked_fill_(is_foreign, -torch.inf)
    return F.pad(bias, (num_prefix, 0, num_prefix, 0))


def without_class_token(attend: Attend) -> Attend:
    """Patches attend to patches alone, the class token to itself."""

    def among_patches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v[:, :, :1], attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])], dim=2)

    return among_patches


def average(outputs: list[StepOutput]) -> StepOutput:
    """Mean of every number."""

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    first = outputs[0]
    return StepOutput(
        mean([out.loss for out in outputs]),
        {name: mean([out.parts[name] for out in outputs]) for name in first.parts},
        {name: mean([out.measures[name] for out in outputs]) for name in first.measures},
    )


def _check(model: ModelSpec, config: Config) -> range:
    """The blocks with homologous attention. Raises ConfigError for options out of range."""
    patches, depth = model.num_patches, SIZES[model.name].depth
    layers = {"all": depth, "all_but_first": depth - 1}.get(config.homo_layers, config.homo_layers)
    if not 2 <= config.members <= patches // 2:
        raise ConfigError(
            f"--mixedae.members: expected 2..{patches // 2}, at least 2 of the {patches} patches for each image, got "
            f"{config.members}; mix fewer images or take a smaller --patch-size"
        )
    if config.topk is not None and not 1 <= config.topk <= patches:
        raise ConfigError(f"--mixedae.topk: expected 1..{patches}, the number of patches, got {config.topk}")
    if not 1 <= layers <= depth:
        raise ConfigError(
            f"--mixedae.homo-layers: expected all, all_but_first or 1..{depth}, the number of the last blocks, got "
            f"{config.homo_layers}; --mixedae.homologous none leaves it out everywhere"
        )
    if not (config.contrast_weight >= 0 and config.temperature > 0):
        raise ConfigError(
            f"--mixedae.contrast-weight, --mixedae.temperature: expected at least 0 and above 0, got "
            f"{config.contrast_weight} and {config.temperature}"
        )
    return range(depth - layers, depth)


METHOD = MixedAE
PRESETS = {
    # MAE's recipe (PRETRAIN.md and section A.1 there): lr 1.5e-4 x images / 256, 40 epochs of warm-up from 0, no
    # clipping. Recalled, not verified: 1024 images a step. Own: 300 epochs, a length for ablations; the paper's headline
    # numbers take 800 and 1600 (--epochs).
    "paper": Preset(
        dict(
            model="vit_base", image_size=224, patch_size=16, batch_size=1024, epochs=300.0, base_lr=1.5e-4,
            weight_decay=0.05, betas=(0.9, 0.95), warmup="40ep", warmup_start=0.0, save_every="5ep", log_every=50,
        ),
        Config(),
        {"vit_huge": dict(patch_size=14), "vit_giant": dict(patch_size=14)},
    ),
    # Own choice, for the generated images on 2 CPU cores; see MAE's. A quarter of an image would show too little there.
    "demo": Preset(
        dict(
            model="vit_pico", image_size=48, patch_size=8, batch_size=32, epochs=50.0, base_lr=5.6e-3,
            weight_decay=0.05, betas=(0.9, 0.95), warmup="2ep", warmup_start=0.0, save_every="10ep", log_every=93,
            reconstruct_every="25ep",
        ),
        Config(members=2, crop_scale=(0.4, 1.0), decoder_width=128, decoder_depth=2, decoder_heads=4),
    ),
}  # fmt: skip
