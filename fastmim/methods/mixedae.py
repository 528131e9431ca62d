"""MixedAE: mixed autoencoder (Chen, Liu, Hong, Xu, Li, Yeung, CVPR 2023, arXiv 2303.17152).

MAE whose input mixes patches of several images, each at its own position. So that the mixture does not help to
reconstruct across images, every patch has to recognize those of its own image ("homologous"): it attends to the keys
that it rates highest, a contrastive loss on the patch features secures that choice, and a segment embedding tells the
images of a mixture apart.

The authors published no code. The abstract and the introduction say that patches are mixed and recognized, and at what cost;
that top-K attention, contrast and segments do it is from summaries of the paper by others, not verified. What else a choice
rests on is said at each option: "recalled" is a number remembered from the paper and not verified, "own" is our choice where no
source says anything. All the rest is MAE (arXiv 2111.06377, github.com/facebookresearch/mae).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from fastmim_kernels import mix_patches, partition, patch_contrastive_loss, topk_attention, unmix_tokens
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor, nn

from fastmim.blocks import Attend, attention
from fastmim.config import SIZES, ConfigError, ModelSpec
from fastmim.homologous import attend_apart, own_image_bias, own_share, without_class_token
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
    """Images of a mixture; each shows 1 / members of its patches. Own: with 4, a step has the FLOPs of MAE's, as the
    paper's 3 % more implies, and 3/4 of each image are hidden as in MAE."""
    mode: Literal["compose", "full"] = "compose"
    """One mixture per group of images, or as many as members, in which every patch of every image is used once. Own;
    the names are those of summaries of the paper."""
    homologous: Literal["topk", "oracle", "none"] = "topk"
    """Keys of a patch: those it rates highest, those of its own image (an upper bound that needs the labels), or all
    (naive mixing)."""
    topk: int | None = None
    """Patch keys that a patch keeps, itself included; none: the number of its image's patches. Own, per head."""
    homo_layers: Literal["all", "all_but_first"] | int = "all"
    """Encoder blocks with homologous attention; a number: the last so many. Own."""
    cls_mode: Literal["shared", "per_image", "none"] = "shared"
    """shared: one class token per mixture, which sees all patches, is a key of all, and goes to each image's decoder;
    per_image: one per image, which carries its segment vector, sees itself and as many patches as a patch does, is a key of
    all patches, and goes to its own decoder alone; none: it stays by itself, so that images meet in no token, and learns
    nothing, though the patches of the exported encoder see it. Own."""
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
    diagnostics: bool = False
    """Also measure the accuracy of top-K by head and, per block, the share of the patches' attention that stays within their
    image, and how rightly keys would be chosen without segments, which costs a pass of the encoder without gradient. Own."""
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

    def __init__(self, model: ModelSpec, spec: DecoderSpec, out_values: int, *, members: int, cls_mode: str):
        super().__init__(model, spec, out_values, num_prefix=0 if cls_mode == "none" else 1)
        self.members, self.has_own_class = members, cls_mode == "per_image"

    def fill(self, tokens: Tensor, src: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
        members = self.members
        if not self.has_own_class:
            return unmix_tokens(tokens, mask_token, position, src, members, self.num_prefix)
        patches = unmix_tokens(tokens[:, members:], mask_token, position[1:], src, members, 0)
        classes = tokens[:, :members].flatten(0, 1).unsqueeze(1) + position[:1]
        return torch.cat([classes.to(patches.dtype), patches], dim=1)

    def places(self, table: Tensor, src: Tensor, count: int) -> Tensor:
        # A mixture shows a patch at every position.
        return torch.cat([table[:1].expand(self.members, -1), table[1:]]) if self.has_own_class else table


class MixedAE(Method):
    Config = Config

    def __init__(self, model: ModelSpec, config: Config):
        super().__init__(model)
        self.config = config
        self.layers = _check(model, config)
        self.batch_multiple = config.members
        self.topk = model.num_patches // config.members if config.topk is None else config.topk
        # Class tokens of a mixture, and how many of them its patches see and the decoders get.
        self.num_classes = config.members if config.cls_mode == "per_image" else 1
        self.num_prefix = 0 if config.cls_mode == "none" else self.num_classes
        self.crops = (CropSpec(size=model.image_size, scale=config.crop_scale),)
        self.pixels = PixelTarget(model, config.norm_pix)
        self.encoder = Encoder(model)
        width = self.encoder.width
        spec = DecoderSpec(config.decoder_width, config.decoder_depth, config.decoder_heads)
        self.decoder = UnmixingDecoder(
            model, spec, model.patch_values, members=config.members, cls_mode=config.cls_mode
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
        shares: list[Tensor] | None = [] if config.diagnostics else None
        latent, hits = self._encode(images, src, shares, flip=flip)
        plan = mask_plan(src, config.members)
        pred = self.decoder(latent[:, self.num_classes - self.num_prefix :], src, plan.ids_masked)
        loss = pixel = self._pixel_loss(pred, images, plan, turn, flip)
        parts = {"pixel": pixel.detach()}
        if config.contrast_weight:
            features = latent[:, self.num_classes :]
            if config.projection == "mlp":
                features = self.projector(features)
            contrast = config.contrast_weight * patch_contrastive_loss(features, src, config.temperature)
            loss, parts["contrast"] = loss + contrast, contrast.detach()
        measures = self._accuracy("topk_accuracy", hits)
        if config.diagnostics:
            measures |= {f"own_attention/{i:02d}": share for i, share in enumerate(shares)}
            for i, h in zip(self.layers, hits):
                heads = (h.float().mean((0, 2)) / self.topk).unbind()
                measures |= {f"topk_accuracy_of_head/{i:02d}.{j:02d}": accuracy for j, accuracy in enumerate(heads)}
            measures |= self._accuracy("topk_accuracy_without_segments", self._unaided_hits(images, src, flip))
        return StepOutput(loss, parts, measures)

    def _accuracy(self, name: str, hits: list[Tensor]) -> dict[str, Tensor]:
        return {f"{name}/{i:02d}": h.float().mean() / self.topk for i, h in zip(self.layers, hits)}

    @torch.no_grad()
    def _unaided_hits(self, images: Tensor, src: Tensor, flip: Tensor) -> list[Tensor]:
        """How many keys are chosen rightly by what the patches show, where segments are not there to tell."""
        if self.config.homologous != "topk" or not self.config.use_segments:
            return []
        return self._encode(images, src, has_segments=False, flip=flip)[1]

    def _encode(
        self,
        images: Tensor,
        src: Tensor,
        shares: list[Tensor] | None = None,
        *,
        has_segments: bool = True,
        **window: object,
    ) -> tuple[Tensor, list[Tensor]]:
        """Latent (G, P + L, D), and for each layer with top-K attention (G, heads, L) how many keys were chosen rightly.

        Args:
            shares: receives what `own_share` finds in each block.
        """
        m, members = self.model, self.config.members
        patches = mix_patches(images, src, m.patch_size, members, mean=m.mean, std=m.std, **window)
        segments = classes = None
        if self.config.cls_mode == "per_image":
            classes = patches.new_zeros(members, self.encoder.width)
        if self.config.use_segments and has_segments:
            segments = self.segments(src)
            classes = None if classes is None else self.segments(torch.arange(members, device=src.device))
        hits: list[Tensor] = []
        attend = self._attends(src, hits, shares)
        return self.encoder(patches, extra=segments, classes=classes, attend=attend), hits

    def _attends(self, src: Tensor, hits: list[Tensor], shares: list[Tensor] | None = None) -> Sequence[Attend]:
        """The attention of each block. When called, top-K attention appends to `hits`, and each block's to `shares`."""
        members, num_prefix = self.config.members, self.num_prefix
        choose = partial(topk_attention, topk=self.topk, num_prefix=num_prefix)

        def topk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, right = choose(q, k, v, labels=src)
            hits.append(right)
            if self.config.cls_mode != "per_image":
                return out
            return torch.cat([attend_apart(q[:, :, :members], k, v, self.topk), out[:, :, members:]], dim=2)

        def watched(attend: Attend, weigh: Attend) -> Attend:
            def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                shares.append(own_share(weigh, q, k, src, members, num_prefix))
                return attend(q, k, v)

            return attend if shares is None else watch

        # With each: one whose rows of patches are the same, and that counts nothing.
        homologous = attention, attention
        if self.config.homologous == "topk":
            homologous = topk, choose
        elif self.config.homologous == "oracle":
            bias = own_image_bias(src, members if self.config.cls_mode == "per_image" else 0, num_prefix)
            homologous = (partial(attention, bias=bias),) * 2
        plain = attention, attention
        attends = [watched(*(homologous if i in self.layers else plain)) for i in range(len(self.encoder.blocks))]
        return attends if num_prefix else [without_class_token(attend) for attend in attends]

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
        pred = self.decoder(latent[:, self.num_classes - self.num_prefix :], src)
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
    if config.cls_mode == "per_image" and not config.use_segments and config.homologous != "oracle":
        raise ConfigError(
            "--mixedae.cls-mode per_image: expected --mixedae.use-segments, which tells the class tokens apart, got none of "
            "them; use segments or --mixedae.cls-mode shared"
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
