"""SimMIM: a simple framework for masked image modeling (Xie et al., CVPR 2022, arXiv 2111.09886).

The encoder sees every place of the image, with a mask token in the masked ones; one linear layer predicts their pixels.
Facts and defaults: github.com/microsoft/SimMIM (files named below). The smallest method here, and the worked example of
docs/adding-a-method.md.
"""

from dataclasses import dataclass

import torch
from fastmim_kernels import gather_tokens, restore_tokens
from fastmim_pipelines.spec import Batch, CropSpec
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.attention import Biased
from fastmim.blocks import random_drop_path
from fastmim.config import SIZES, ConfigError, ModelSpec, check_range
from fastmim.masking import CellPolicy, MaskPlan
from fastmim.methods.base import Method, Preset, StepOutput
from fastmim.targets import PixelTarget, Reconstruction
from fastmim.views import random_flip
from fastmim.vit import Encoder


@dataclass(frozen=True)
class Config:
    """Options of SimMIM. Source, unless said otherwise: configs/vit_base__800ep."""

    mask_ratio: float = 0.6
    """Share of cells that are masked, rounded up to whole cells."""
    mask_cell: int = 2
    """Masking unit in patches a side: 32 pixels."""
    norm_pix: bool = False
    """Normalize the target per patch. Source: not in the recipe of this model; MAE's best practice is to do it."""
    crop_scale: tuple[float, float] = (0.67, 1.0)
    """Area of the random crop. Source: data/data_simmim.py."""
    layer_scale: float = 0.1
    """Start of the factors of the residual branches. Source: config.py INIT_VALUES."""
    drop_path: float = 0.1
    """Largest rate of stochastic depth: it grows linearly from 0 over the blocks."""


class RelativeBias(nn.Module):
    """What is added to the attention scores of all blocks: a number per head and offset between two patches.

    Three more stand for class token to patch, patch to class token, and class token to itself.

    Source: models/vision_transformer.py `RelativePositionBias`.
    """

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        h, w = grid
        offsets = (2 * h - 1) * (2 * w - 1)
        row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
        index = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1
        index = F.pad(index, (1, 0, 1, 0))
        index[0], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        self.register_buffer("index", index, persistent=False)
        self.table = nn.Parameter(torch.zeros(offsets + 3, heads))

    def forward(self) -> Tensor:
        """(heads, 1 + L, 1 + L), rows are queries."""
        return self.table[self.index].permute(2, 0, 1).contiguous()


class MaskedEncoder(Encoder):
    """An encoder that is given the visible patches and puts a learned token in the place of the others.

    Source: models/simmim.py `VisionTransformerForSimMIM`.
    """

    def __init__(self, model: ModelSpec, **design: object):
        super().__init__(model, **design)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.relative_bias = RelativeBias(model.grid, SIZES[model.name].heads)
        initialize(self)

    def embed(self, patches: Tensor, ids_restore: Tensor | None) -> Tensor:
        tokens = self.patch_embed(patches)
        if ids_restore is None:
            return tokens
        # The same as embedding all patches and replacing the masked ones; there is no absolute position to add.
        return restore_tokens(tokens, self.mask_token.flatten(), self.position[1:], ids_restore, num_prefix=0)

    def forward(self, patches: Tensor, ids_restore: Tensor | None = None, *, drop: Tensor | None = None) -> Tensor:
        """(B, K, V) visible patches, (B, L) inverse of (ids_keep, ids_masked) -> (B, 1 + L, D) in raster order.

        Without `ids_restore`, the patches are all L of them.
        """
        return super().forward(patches, ids_restore, attend=Biased(self.relative_bias()), drop=drop)


def initialize(encoder: MaskedEncoder) -> None:
    """Normal weights of deviation 0.02, cut at one deviation; the last layer of branch n shrinks by sqrt(2 n).

    Source: models/vision_transformer.py `_init_weights`, `fix_init_weight`, with the cut of models/simmim.py.
    """
    linears = [part for part in encoder.modules() if isinstance(part, nn.Linear)]
    for weight in [encoder.cls_token, encoder.mask_token, *(linear.weight for linear in linears)]:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    nn.init.zeros_(encoder.patch_embed.bias)
    with torch.no_grad():
        for n, block in enumerate(encoder.blocks, start=1):
            block.attn.proj.weight /= (2 * n) ** 0.5
            block.fc2.weight /= (2 * n) ** 0.5


class SimMIM(Method):
    Config = Config

    @classmethod
    def encoder_class(cls, model: ModelSpec) -> type[nn.Module]:
        return MaskedEncoder

    def __init__(self, model: ModelSpec, config: Config):
        super().__init__(model)
        check_range("--simmim.layer-scale", config.layer_scale, 0)
        if not 0 <= config.drop_path < 1:
            raise ConfigError(f"--simmim.drop-path: expected 0 <= rate < 1, got {config.drop_path}")
        self.crops = (CropSpec(size=model.image_size, scale=config.crop_scale),)
        # 19 of 49 cells stay visible at 0.6: the source masks ceil(0.6 x 49) = 30.
        self.mask = CellPolicy(model, config.mask_ratio, config.mask_cell)
        self.pixels = PixelTarget(model, config.norm_pix)
        self.drop_path = config.drop_path
        self.encoder = MaskedEncoder(model, position=None, layer_scale=config.layer_scale, key_bias=False)
        # The source's 1 x 1 convolution and pixel shuffle, with the outputs in the order of our patches.
        self.head = nn.Linear(self.encoder.width, model.patch_values)

    def _encode(self, images: Tensor, plan: MaskPlan, drop: Tensor | None = None, **window: object) -> Tensor:
        """(B, L, D) tokens of the patches."""
        return self.encoder(self.pixels.patches(images, plan.ids_keep, **window), plan.ids_restore, drop=drop)[:, 1:]

    def forward(self, batch: Batch, rng: Tensor) -> StepOutput:
        flip, plan = random_flip(rng, batch.ids), self.mask(rng, batch.ids)
        (drop,) = random_drop_path(rng, batch.ids, self.drop_path, len(self.encoder.blocks))
        tokens = self._encode(batch.crops[0], plan, drop, flip=flip)
        pred = self.head(gather_tokens(tokens, plan.ids_masked))
        # The mean over the masked values: the source's sum / masked pixels / 3, but for the 1e-5 that it adds to the count.
        loss = self.pixels.loss(pred, batch.crops[0], plan.ids_masked, kind="l1", flip=flip)
        return StepOutput(loss, {"pixel": loss.detach()})

    def no_decay(self, name: str, parameter: Tensor) -> bool:
        # Source: models/vision_transformer.py `no_weight_decay`: the mask token, which the Swin variant spares, and the table
        # of relative positions are decayed.
        return name.endswith("cls_token") or super().no_decay(name, parameter)

    def reconstruct(self, images: Tensor, ids: Tensor, rng: Tensor) -> Reconstruction:
        plan = self.mask(rng, ids)
        return self.pixels.picture(self.head(self._encode(images, plan)), images, plan)


METHOD = SimMIM
PRESETS = {
    # simmim_pretrain__vit_base__img224__800ep.yaml: 1e-4 x batch / 512 (main_simmim.py), warm-up from 5e-7 x batch / 512, a
    # tenth of the rate from epoch 700 on. 16 x 128 images: the README's example (of Swin-B) and config.py's 128.
    "paper": Preset(
        dict(
            model="vit_base", image_size=224, patch_size=16, batch_size=2048, epochs=800.0, base_lr=5e-5,
            weight_decay=0.05, betas=(0.9, 0.999), clip=5.0, schedule="step", warmup="10ep", warmup_start=5e-3,
            save_every="5ep", log_every=50,
        ),
        Config(),
        {"vit_huge": dict(patch_size=14), "vit_giant": dict(patch_size=14)},
    ),
    # Own choice, for the generated images on 2 CPU cores; see MAE's. In so few steps layer scale and plain pixels hold
    # the encoder back: linear probe 22.5 % with both after 20 epochs at lr 7e-4, 45.0 % without, with half of the patches
    # masked and lr 2e-3 after 30 (600 images, n = 1). After 60 epochs, k-NN is 25 to 30 % with any share of 0.35 to 0.75
    # masked and any rate, and betas (0.9, 0.95) help. Weight decay 0.05, 0.1, 0.3: k-NN 28.8, 37.8, 33.2 %, probe 52.8,
    # 57.3, 50.3 % after 50 epochs (with seed 1, 0.1: 38.0, 58.5 %); 0.05 and 0.1: 41.8, 40.0 %, and 63.7, 65.2 % after 100.
    "demo": Preset(
        dict(
            model="vit_pico", image_size=48, patch_size=8, batch_size=32, epochs=50.0, base_lr=16e-3,
            weight_decay=0.1, betas=(0.9, 0.95), clip=5.0, warmup="2ep", warmup_start=0.0, save_every="10ep",
            log_every=93, reconstruct_every="25ep",
        ),
        Config(mask_ratio=0.5, mask_cell=1, norm_pix=True, crop_scale=(0.4, 1.0), layer_scale=0.0, drop_path=0.0),
    ),
}  # fmt: skip
