"""CAE: context autoencoder (Chen et al., IJCV 2023, arXiv 2202.03026).

The encoder sees half of the patches. A regressor of cross-attention blocks predicts the latents of the others, which
shall equal what the encoder makes of these patches; a decoder, from the predicted latents alone, the patches' tokens.
Facts and defaults: github.com/Atten4Vis/CAE (files named below); [PD] is PaddlePaddle/PASSL, the authors' first code.

The tokens are those of DALL-E's discrete VAE: `--cae.tokenizer encoder.pkl`. Without it the decoder predicts pixels.
Any other tokenizer is an nn.Module as `fastmim.tokenizer.Tokenizer` describes it: `--cae.tokenizer package.module:function`
names what makes it, and in Python `CAE(model, Config(), tokenizer=module)` takes it. `--cae.tokens` reads ids that were
recorded (fastmim/tokenizer/recorded.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from fastmim_kernels import TokenLoss, gather_tokens, linear_cross_entropy
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim import savers
from fastmim.attention import attend_tokens
from fastmim.blocks import NORM_EPS, Block, Branch, Linear, Norm, Residual, random_drop_path, run_blocks
from fastmim.config import SIZES, ConfigError, ModelSpec, check_range
from fastmim.masking import BlockPolicy, MaskPlan, RandomPolicy
from fastmim.methods.base import Method, Preset, StepOutput
from fastmim.recompute import called
from fastmim.targets import PixelTarget, Reconstruction
from fastmim.tokenizer import PUBLISHED, RecordedTarget, Tokenizer, TokenTarget, load_tokenizer
from fastmim.views import random_flip
from fastmim.vit import Encoder, sincos_position


@dataclass(frozen=True)
class Config:
    """Options of CAE. Source, unless said otherwise: tools/run_pretraining.py with scripts/cae_base_300e.sh."""

    target: Literal["auto", "dvae", "pixel"] = "auto"
    """What the decoder predicts. auto: tokens if there is a tokenizer or a recording, else pixels."""
    tokenizer: str | None = None
    """The d-VAE encoder: OpenAI's encoder.pkl, or the same weights as a state dict or .safetensors. Or
    package.module:function, which is called without arguments and gives a tokenizer of your own."""
    tokens: Path | None = None
    """Folder of recorded token ids, in place of computing them. The tokenizer is then only compared with it, if given."""
    mask: Literal["block", "random"] = "block"
    """Rectangles of patches, or any patches, which makes another method: blocks lie mostly in the middle. Source:
    furnace/masking_generator.py has both."""
    mask_ratio: float = 0.5
    """Share of patches that the encoder does not see: 98 of 196. The first version had 75 (0.38)."""
    norm_pix: bool = True
    """Normalize the target per patch where it is pixels. Source: [PD], its default."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop."""
    regressor_depth: int = 4
    decoder_depth: int = 4
    """0: the regressor's latents are mapped to the target by the last layer alone, the paper's ablation."""
    decoder_width: int | None = None
    """Of regressor and decoder; none: the encoder's. Source: 768 for vit_base; 1024 is meant for vit_large."""
    decoder_heads: int | None = None
    """Of regressor and decoder; none: the encoder's. Source: 12 for vit_base; 16 is meant for vit_large."""
    layer_scale: float | None = None
    """Start of the factors of all residual branches; none: 0.1, and 1e-5 from vit_large on. Source: scripts."""
    decoder_layer_scale: float | None = None
    """Start of those of regressor and decoder; none: as the encoder's. Source: 0.1 at any size, as the flag is never read."""
    drop_path: float = 0.1
    """Largest rate of stochastic depth: it grows linearly from 0 over the blocks of each network."""
    align_weight: float = 2.0
    """Of the squared error between predicted and encoded latents."""
    init: Literal["auto", "xavier", "beit"] = "auto"
    """Initial weights; auto: xavier, and beit from vit_large on. Source: --fix_init_weight of scripts/cae_large_1600e.sh."""


LARGE = ("vit_large", "vit_huge", "vit_giant")


class CrossAttention(nn.Module):
    """Attention with inputs of their own for queries, keys and values; keys have no bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.k = Linear(width, width, bias=False)
        self.v = Linear(width, width)
        self.proj = Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, M, D), (B, N, D), (B, N, D), projected by `q`, `k` and `v` -> (B, M, D)."""
        out = attend_tokens(*(x.unflatten(2, (self.heads, -1)) for x in (queries, keys, values)))
        return self.proj(out.flatten(2))


class RegressorBlock(Residual):
    """Queries attend to visible latents and to all queries. Source: models/modeling_cae_helper.py `RegressorBlock`."""

    def __init__(self, width: int, heads: int, layer_scale: float):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (Norm(width) for _ in range(4))
        self.attn = CrossAttention(width, heads)
        self.add_mlp(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        visible: Tensor,
        position: Tensor,
        drop: Tensor | None,
        projected: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, M, D) queries.
            visible: (B, K, D) latents.
            position: (B, K + M, D) of both.
            drop: (B, 2), see `random_drop_path`.
            projected: queries, keys and values as `project_all` gives them, if they are known.
        """
        q, k, v = self.project_all(x, visible, position) if projected is None else projected
        # As in the source: the second residual starts from the normalized tokens.
        attended, last = (None, None) if drop is None else drop.unbind(1)
        x, _ = self.norm2(x, Branch(self.attn(q, k, v), self.gamma_1, attended))
        return Branch(self.project(self.fc1(x), self.fc2), self.gamma_2, last).added_to(x)

    def project_all(self, x: Tensor, visible: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, M, D), keys and values (B, K + M, D)."""
        both = torch.cat([visible, x.to(visible.dtype)], dim=1)
        queries, _ = self.norm_q(x, Branch(position[:, visible.shape[1] :]))
        # Values have no position, and the residual takes the queries without theirs.
        attn = self.attn
        return attn.q(queries), attn.k(self.norm_k(both, Branch(position))[0]), attn.v(self.norm_v(both)[0])

    def project_once(
        self, mask_token: Tensor, visible: Tensor, table: Tensor, plan: MaskPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same where all queries are the mask token (1, 1, D): once per position of the table (L, D), not per image."""
        attn, batch = self.attn, len(visible)
        everywhere = mask_token.expand(1, len(table), -1)
        queries = attn.q(self.norm_q(everywhere, Branch(table[None]))[0])
        token = mask_token.to(visible.dtype)
        masked_keys = attn.k(self.norm_k(token.expand_as(everywhere), Branch(table[None]))[0])
        keys = attn.k(self.norm_k(visible, Branch(table[plan.ids_keep]))[0])
        value = attn.v(self.norm_v(token)[0]).expand(batch, plan.ids_masked.shape[1], -1)
        values = attn.v(self.norm_v(visible)[0])

        def chosen(rows: Tensor) -> Tensor:
            return gather_tokens(rows.expand(batch, -1, -1), plan.ids_masked)

        return chosen(queries), torch.cat([keys, chosen(masked_keys)], dim=1), torch.cat([values, value], dim=1)


class Regressor(nn.Module):
    """Latents of the visible patches -> latents of the masked ones. Source: `LatentRegresser`."""

    def __init__(self, model: ModelSpec, width: int, heads: int, depth: int, layer_scale: float):
        super().__init__()
        self.savers = savers.chosen()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("position", sincos_position(width, model.grid, "row")[1:], persistent=False)
        self.blocks = nn.ModuleList(RegressorBlock(width, heads, layer_scale) for _ in range(depth))
        self.norm = Norm(width)

    def forward(self, visible: Tensor, plan: MaskPlan, drop: Tensor | None = None) -> Tensor:
        """(B, K, D) without class token; drop (B, depth, 2) -> (B, M, D)."""
        position = self.position[torch.cat([plan.ids_keep, plan.ids_masked], dim=1)]
        x, projected = self.mask_token.expand(*plan.ids_masked.shape, -1), None
        if "first" in self.savers:
            projected = self.blocks[0].project_once(self.mask_token, visible, self.position, plan)
        for i, block in enumerate(self.blocks):
            x = called(block, x, visible, position, None if drop is None else drop[:, i], projected)
            projected = None
        return self.norm(x)[0]


class Head(Linear):
    """The last layer; with labels, the cross entropy of its outputs, which are then never held as a whole."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | TokenLoss:
        """(B, M, D), (B, M) -> (B, M, values), or mean loss and accuracy."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, 1), self.weight, self.bias, labels.flatten())


class LatentDecoder(nn.Module):
    """Predicted latents of the masked patches -> what these patches are. It sees nothing else. Source: `Decoder`.

    Without blocks it is the last layer alone: the latents come from a norm.
    """

    def __init__(self, model: ModelSpec, width: int, heads: int, depth: int, layer_scale: float, values: int):
        super().__init__()
        self.register_buffer("position", sincos_position(width, model.grid, "row")[1:], persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=layer_scale, key_bias=False) for _ in range(depth))
        self.norm = Norm(width) if depth else None
        self.head = Head(width, values)

    def forward(
        self, latent: Tensor, ids_masked: Tensor, drop: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | TokenLoss:
        """(B, M, D) latents of the patches (B, M); see `Head` for labels and result."""
        if self.norm is None:
            return self.head(latent, labels)
        x = latent + self.position[ids_masked]
        return self.head(self.norm(*run_blocks(self.blocks, x, drop=drop))[0], labels)


class CAE(Method):
    Config = Config
    ungraded = ("encoder",)

    def __init__(self, model: ModelSpec, config: Config, tokenizer: Tokenizer | None = None):
        super().__init__(model)
        self.config = config
        self.mask = {"block": BlockPolicy, "random": RandomPolicy}[config.mask](model, config.mask_ratio)
        self.pixels = PixelTarget(model, config.norm_pix)
        self.tokens = self._token_target(tokenizer)
        self.crops = (CropSpec(size=model.image_size, scale=config.crop_scale),)
        if self.tokens is not None:
            self.crops += self.tokens.crops(config.crop_scale)

        size, is_large = SIZES[model.name], model.name in LARGE
        width, heads = config.decoder_width or size.width, config.decoder_heads or size.heads
        if width % 4 or width % heads:
            raise ConfigError(f"cae decoder_width: expected a multiple of 4 and of {heads} heads, got {width}")
        check_range("--cae.regressor-depth", config.regressor_depth, 1)
        check_range("--cae.decoder-depth", config.decoder_depth, 0)
        if not 0 <= config.drop_path < 1:
            raise ConfigError(f"cae drop_path: expected 0 <= rate < 1, got {config.drop_path}")
        scale = config.layer_scale if config.layer_scale is not None else (1e-5 if is_large else 0.1)
        check_range("--cae.layer-scale", scale, 0)
        inner = config.decoder_layer_scale if config.decoder_layer_scale is not None else scale
        check_range("--cae.decoder-layer-scale", inner, 0)
        check_range("--cae.align-weight", config.align_weight, 0)
        values = model.patch_values if self.tokens is None else self.tokens.vocabulary
        self.encoder = Encoder(model, position="row", layer_scale=scale, key_bias=False)
        same = width == size.width
        self.bridge = (
            nn.Identity() if same else nn.Sequential(nn.Linear(size.width, width), nn.LayerNorm(width, eps=NORM_EPS))
        )
        self.regressor = Regressor(model, width, heads, config.regressor_depth, inner)
        self.decoder = LatentDecoder(model, width, heads, config.decoder_depth, inner, values)
        self.depths = (size.depth, size.depth, config.regressor_depth, config.decoder_depth)
        for network in (self.encoder, self.regressor, self.decoder):
            initialize(network)
        if config.init == "xavier" or (config.init == "auto" and not is_large):
            initialize_again(self, self.encoder.patch_embed)

    def _token_target(self, tokenizer: Tokenizer | None) -> TokenTarget | RecordedTarget | None:
        """Where tokens come from; None: the target is pixels."""
        c = self.config
        if c.target == "pixel":
            return None
        if tokenizer is None and c.tokenizer is not None:
            tokenizer = load_tokenizer(str(c.tokenizer), self.model)
        if c.tokens is not None:
            return RecordedTarget(c.tokens, self.model, tokenizer)
        if tokenizer is not None:
            return TokenTarget(tokenizer, self.model)
        if c.target == "dvae":
            raise ConfigError(
                f"--cae.target dvae: expected --cae.tokenizer with OpenAI's encoder.pkl, got none; "
                f"download {PUBLISHED} or use --cae.target pixel"
            )
        self.notes = ("the decoder predicts pixels, not the paper's d-VAE tokens: no --cae.tokenizer was given",)
        return None

    def _predict(self, images: Tensor, plan: MaskPlan, drops: list[Tensor] | None = None, **window: object) -> Tensor:
        """(B, M, D) latents of the masked patches, from the visible ones."""
        drop_visible, _, drop_regressor, _ = drops or [None] * 4
        visible = self.pixels.patches(images, plan.ids_keep, **window)
        latent = self.bridge(self.encoder(visible, plan.ids_keep, drop=drop_visible))
        # The class token is trained through the encoder's attention alone.
        return self.regressor(latent[:, self.encoder.num_prefix :], plan, drop_regressor)

    @torch.no_grad()
    def _encode_masked(self, images: Tensor, plan: MaskPlan, drop: Tensor, **window: object) -> Tensor:
        """(B, M, D): what the same encoder, with stochastic depth of its own, makes of the masked patches alone."""
        masked = self.pixels.patches(images, plan.ids_masked, **window)
        latent = self.encoder(masked, plan.ids_masked, drop=drop)
        return self.bridge(latent[:, self.encoder.num_prefix :])

    def forward(self, batch: Batch, rng: Tensor) -> StepOutput:
        images, plan = batch.crops[0], self.mask(rng, batch.ids)
        flip = random_flip(rng, batch.ids)
        drops = random_drop_path(rng, batch.ids, self.config.drop_path, *self.depths)
        predicted = self._predict(images, plan, drops, flip=flip)
        # After the pass with gradient: autocast keeps the low-precision copies of weights that it makes first, and
        # those made without gradient would cut the weights off.
        target = self._encode_masked(images, plan, drops[1], flip=flip)
        align = self.config.align_weight * F.mse_loss(predicted.float(), target.float())
        if self.tokens is None:
            pred = self.decoder(predicted, plan.ids_masked, drops[3])
            # [PD] with target_mode rgb and its default, layernorm; there the variance is biased, here as in MAE.
            decoded = self.pixels.loss(pred, images, plan.ids_masked, flip=flip)
            name, measures = "pixel", {}
        else:
            # Outside of autocast, as in the source: low precision changes ids.
            with torch.autocast(images.device.type, enabled=False):
                labels = self.tokens(batch, rng, flip, plan.ids_masked)
            decoded, accuracy = self.decoder(predicted, plan.ids_masked, drops[3], labels)
            name, measures = "token", {"mlm_acc": accuracy}
        return StepOutput(decoded + align, {name: decoded.detach(), "align": align.detach()}, measures)

    def reconstruct(self, images: Tensor, ids: Tensor, rng: Tensor) -> Reconstruction | None:
        if self.tokens is not None:
            return None
        plan = self.mask(rng, ids)
        pred = self.decoder(self._predict(images, plan), plan.ids_masked)
        places = plan.ids_masked.unsqueeze(-1).expand_as(pred)
        whole = pred.new_zeros(len(pred), self.model.num_patches, pred.shape[2]).scatter(1, places, pred)
        return self.pixels.picture(whole, images, plan)


def initialize(network: nn.Module) -> None:
    """Normal weights of deviation 0.02, cut at one deviation; the last layer of branch n shrinks by sqrt(2 n).

    Source: models/modeling_cae_helper.py `_init_weights`, `fix_init_weight` (BEiT's).
    """
    for part in network.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for name, parameter in network.named_parameters(recurse=False):
        if name.endswith("_token"):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
    with torch.no_grad():
        for n, block in enumerate(network.blocks, start=1):
            block.attn.proj.weight /= (2 * n) ** 0.5
            block.fc2.weight /= (2 * n) ** 0.5


def initialize_again(method: nn.Module, patch_embed: nn.Linear) -> None:
    """Xavier uniform for all linear layers but the patch embedding, which the source has as a convolution; bias 0.

    Fused projections of queries, keys and values count as one matrix. Source: models/modeling_cae.py `_init_weights`.
    """
    for part in method.modules():
        if isinstance(part, nn.Linear) and part is not patch_embed:
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


METHOD = CAE
PRESETS = {
    # scripts/cae_base_300e.sh: 64 images on each of 32 GPUs at lr 1.5e-3, which here follows --batch-size; warm-up from
    # 0, cosine to 1e-5, AdamW with torch's betas. The other lengths are 800 epochs with --warmup 20ep and 1600 with
    # 40ep (cae_base_800e.sh, cae_large_1600e.sh).
    "paper": Preset(
        dict(
            model="vit_base", image_size=224, patch_size=16, batch_size=2048, epochs=300.0,
            base_lr=1.5e-3 * 256 / 2048, weight_decay=0.05, betas=(0.9, 0.999), clip=3.0, warmup="10ep",
            warmup_start=0.0, lr_end=1e-5 / 1.5e-3, save_every="5ep", log_every=50,
        ),
        Config(),
        {"vit_large": dict(epochs=1600.0, warmup="40ep"), "vit_huge": dict(patch_size=14), "vit_giant": dict(patch_size=14)},
    ),
    # Own choice, for the generated images on 2 CPU cores; see MAE's. In so few steps the published weight of the alignment
    # makes all latents alike: linear probe 30.8 % after 20 epochs with 2, 45.5 % after 30 with 0.2 (600 images, n = 1).
    # Blocks hide half of so small a grid at a stretch: k-NN 28.8 %, linear probe 50.7 % after 50 epochs, with random masks
    # 42.8 and 63.8 % (the same images, n = 1).
    "demo": Preset(
        dict(
            model="vit_pico", image_size=48, patch_size=8, batch_size=32, epochs=50.0, base_lr=8e-3,
            weight_decay=0.05, betas=(0.9, 0.999), clip=3.0, warmup="2ep", warmup_start=0.0, save_every="10ep",
            log_every=93, reconstruct_every="25ep",
        ),
        Config(
            mask="random", crop_scale=(0.4, 1.0), regressor_depth=1, decoder_depth=1, align_weight=0.05, drop_path=0.0
        ),
    ),
}  # fmt: skip
