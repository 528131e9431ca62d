"""What a training step costs: FLOPs per image of each method's published algorithm, and the share of a device's peak.

Conventions: one multiply-add is two FLOPs; softmax, norms, activations, losses without a matrix product, and the
optimizer count as none; the published algorithm counts, not ours, so that leaving work out shows as speed: MAE embeds all
patches and predicts all of them. Losses that compare the images of a batch are left out (InfoNCE at 4096 images: 0.002
GFLOP per image of a ViT-B).

A method that is not listed here has no figure, unless its file defines `flops(model, options) -> list[Term]`.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from fastmim.config import SIZES, ModelSpec, count_kept
from fastmim.conv import STAGE_BLOCKS, stage_widths
from fastmim.tokenizer import is_function

# Passes of a training step over a part: forward, gradient of its weights, gradient of its input. The first layer's
# input, pixels, needs none; targets go forward alone.
TRAINED, FIRST, FROZEN = 3, 2, 1


class Term(NamedTuple):
    """One part of a method.

    Args:
        name: what it is.
        forward: FLOPs of one forward pass, per image of the batch.
        passes: TRAINED, FIRST or FROZEN.
    """

    name: str
    forward: float
    passes: int = TRAINED


class Flops(NamedTuple):
    """Per image of the batch."""

    forward: float
    training: float
    """Forward and backward."""
    terms: tuple[Term, ...]


Formula = Callable[[ModelSpec, Any], list[Term]]

# Tokens of DALL-E's discrete VAE.
DALLE_TOKENS = 8192
# Width of the optional head before MixedAE's contrastive loss (methods/mixedae.py).
PROJECTION_OUT = 256


def training_flops(method: str, model: ModelSpec, options: Any, formula: Formula | None = None) -> Flops | None:
    """What one image costs, or None for a method without a formula.

    Args:
        method: name of the method.
        model: sizes.
        options: the method's Config.
        formula: the method's own (`flops` of its file), which comes before the one that is known here.
    """
    formula = formula or FORMULAS.get(method)
    if formula is None:
        return None
    terms = tuple(formula(model, options))
    return Flops(sum(t.forward for t in terms), sum(t.passes * t.forward for t in terms), terms)


# ---- terms


def linear(rows: float, inputs: float, outputs: float) -> float:
    return 2 * rows * inputs * outputs


def blocks(tokens: float, width: int, depth: int) -> float:
    """Transformer blocks with self-attention and an MLP of ratio 4: 24 n d^2 + 4 n^2 d each."""
    return depth * (linear(tokens, width, 12 * width) + 2 * linear(tokens, width, tokens))


def prefix(model: ModelSpec) -> int:
    """Tokens that stand for no patch: the class token."""
    return 1 if model.stem == "patch" else 0


def encoder(model: ModelSpec, visible: float, name: str = "encoder", passes: int = TRAINED) -> list[Term]:
    """Embedding of all patches, then the blocks on so many of them and the class token."""
    width, depth, _ = SIZES[model.name]
    if model.stem == "conv":
        return _conv_encoder(model, visible, name, passes)
    embed = Term(f"{name}: patches", linear(model.num_patches, model.patch_values, width), min(passes, FIRST))
    return [embed, Term(name, blocks(visible + 1, width, depth), passes)]


def _conv_encoder(model: ModelSpec, visible: float, name: str, passes: int) -> list[Term]:
    """ConvMAE's: convolutions over the whole image, one block less, no class token. Source: models_convmae.py."""
    width, depth, _ = SIZES[model.name]
    patches, (first, second) = model.num_patches, stage_widths(model.name)
    stages = 0.0
    for pixels, channels in ((16 * patches, first), (4 * patches, second)):
        # Two 1 x 1 convolutions, a depthwise 5 x 5 one, an MLP of ratio 4; later the skip connection to the output.
        stages += STAGE_BLOCKS * (linear(pixels, channels, 10 * channels) + 2 * 25 * pixels * channels)
        stages += linear(pixels, channels, width)
    stages += linear(4 * patches, 4 * first, second) + linear(patches, 4 * second + width, width)
    embed = Term(f"{name}: patches", linear(patches, model.patch_values, first), min(passes, FIRST))
    return [embed, Term(f"{name}: stages", stages, passes), Term(name, blocks(visible, width, depth - 1), passes)]


def decoder(
    model: ModelSpec,
    latent: float,
    width: int,
    depth: int,
    outputs: int,
    *,
    name: str = "decoder",
    copies: int = 1,
    num_prefix: int | None = None,
) -> Term:
    """MAE's: the encoder's tokens embedded, blocks on all tokens, a vector per token predicted.

    Args:
        latent: tokens per image that come from the encoder.
        copies: sequences that are decoded per image.
        num_prefix: tokens that stand for no patch; none: the encoder's.
    """
    tokens = model.num_patches + (prefix(model) if num_prefix is None else num_prefix)
    each = blocks(tokens, width, depth) + linear(tokens, width, outputs)
    return Term(name, linear(latent, SIZES[model.name].width, width) + copies * each)


def mlp(*widths: int) -> float:
    """One vector through linear layers."""
    return sum(linear(1, a, b) for a, b in pairwise(widths))


def kept_cells(model: ModelSpec, mask_ratio: float, cell: int) -> int:
    """Patches that stay visible where cells of `cell` x `cell` patches are masked."""
    return count_kept(model.num_patches // cell**2, mask_ratio) * cell**2


# ---- methods


def mae(model: ModelSpec, o: Any) -> list[Term]:
    visible = count_kept(model.num_patches, o.mask_ratio)
    latent = visible + prefix(model)
    return [
        *encoder(model, visible),
        decoder(model, latent, o.decoder_width, o.decoder_depth, model.patch_values),
    ]


def cmae(model: ModelSpec, o: Any) -> list[Term]:
    width = SIZES[model.name].width
    visible = kept_cells(model, o.mask_ratio, o.mask_cell)
    latent = visible + prefix(model)
    projector = mlp(width, o.head_hidden, o.head_out)
    return [
        *encoder(model, visible),
        decoder(model, latent, o.decoder_width, o.pixel_decoder_depth, model.patch_values, name="pixel decoder"),
        decoder(model, latent, o.decoder_width, o.feature_decoder_depth, width, name="feature decoder"),
        Term("heads", projector + mlp(o.head_out, o.head_hidden, o.head_out)),
        *encoder(model, model.num_patches, "target encoder", FROZEN),
        Term("target head", projector, FROZEN),
    ]


def mixedae(model: ModelSpec, o: Any) -> list[Term]:
    """Per image, not per mixture. The choice of keys is no product; attention is counted dense."""
    patches, width = model.num_patches, SIZES[model.name].width
    turns = o.members if o.mode == "full" else 1
    mixtures = turns / o.members
    classes = o.members if o.cls_mode == "per_image" else 1
    num_prefix = 0 if o.cls_mode == "none" else classes
    terms = [Term(t.name, mixtures * t.forward, t.passes) for t in encoder(model, patches + classes - 1)]
    latent, sizes = mixtures * (patches + num_prefix), (o.decoder_width, o.decoder_depth, model.patch_values)
    terms.append(decoder(model, latent, *sizes, copies=turns, num_prefix=min(num_prefix, 1)))
    if o.contrast_weight:
        projects = o.projection == "mlp"
        head = patches * mlp(width, width, PROJECTION_OUT) if projects else 0.0
        similarity = linear(patches, PROJECTION_OUT if projects else width, patches)
        terms.append(Term("contrast", mixtures * (head + similarity)))
    return terms


def cae(model: ModelSpec, o: Any) -> list[Term]:
    width = SIZES[model.name].width
    visible = count_kept(model.num_patches, o.mask_ratio)
    masked, inner = model.num_patches - visible, o.decoder_width or width
    bridge = 0.0 if inner == width else linear(1, width, inner)
    # Queries and output of the masked patches; keys and values of all of them; two products; an MLP of ratio 4.
    cross = linear(masked, inner, 2 * inner) + linear(model.num_patches, inner, 2 * inner)
    cross += 2 * linear(masked, inner, model.num_patches) + linear(masked, inner, 8 * inner)
    # With recorded tokens no tokenizer runs, unless it is given for comparison, which happens once.
    is_pixel = o.target == "pixel" or (o.target == "auto" and not (o.tokenizer or o.tokens))
    values = model.patch_values if is_pixel else DALLE_TOKENS
    terms = [
        *encoder(model, visible),
        Term("regressor", visible * bridge + o.regressor_depth * cross),
        Term("decoder", blocks(masked, inner, o.decoder_depth)),
        Term("head", linear(masked, inner, values)),
        # The published code embeds all patches once more and then selects.
        *encoder(model, masked, "target encoder", FROZEN),
        Term("target bridge", masked * bridge, FROZEN),
    ]
    # What a tokenizer of the user's own costs is not known: it counts as nothing.
    if is_pixel or o.tokens or is_function(o.tokenizer):
        return terms
    return [*terms, Term("tokenizer", dalle_encoder(model), FROZEN)]


def dalle_encoder(model: ModelSpec) -> float:
    """DALL-E's convolutional encoder at 8 x 8 pixels per patch: four groups of two bottleneck blocks, each group at half
    the sides and twice the channels of the one before. Source: openai/DALL-E dall_e/encoder.py.
    """
    pixels, channels = 64 * model.num_patches, 256
    total, inputs = linear(pixels, 7 * 7 * model.in_chans, channels), channels
    for group in range(4):
        outputs = channels * 2**group
        hidden = outputs // 4
        for _ in range(2):
            total += linear(pixels, 9 * (inputs + 2 * hidden), hidden) + linear(pixels, hidden, outputs)
            # A block that widens has a 1 x 1 convolution beside it.
            total += linear(pixels, inputs, outputs) if inputs != outputs else 0.0
            inputs = outputs
        pixels = pixels / 4 if group < 3 else pixels
    return total + linear(pixels, inputs, DALLE_TOKENS)


def icmae(model: ModelSpec, o: Any) -> list[Term]:
    """Per image: both of its views, or one through the online networks and the other through the momentum ones."""
    patches, (width, _, _) = model.num_patches, SIZES[model.name]
    views = 2 if o.second_view == "full" else 1
    visible = count_kept(patches, o.mask_ratio)
    embed, body = encoder(model, visible)
    terms = [
        embed._replace(passes=FROZEN) if o.freeze_patch_embed else embed,
        body,
        decoder(model, visible + 1, o.decoder_width, o.decoder_depth, model.patch_values),
    ]
    if o.position != "none":
        asked = max(1, round(o.pos_drop * visible)) if o.pos_drop else visible
        terms.append(Term("position head", asked * mlp(width, width // 2, patches)))
    if o.contrast == "enc_cls":
        projector, predictor = mlp(width, o.head_hidden, o.head_out), mlp(o.head_out, o.head_hidden, o.head_out)
        terms += [Term("heads", projector + predictor), *encoder(model, visible, "target encoder", FROZEN)]
        terms.append(Term("target head", projector, FROZEN))
    elif o.contrast == "sd_dec":
        two_blocks = blocks(patches + 1, width, 2) + mlp(width, o.head_hidden, o.head_hidden, width)
        terms += [Term("class blocks", two_blocks), Term("heads", mlp(width, o.head_hidden, width))]
        terms.append(Term("target class blocks", two_blocks, FROZEN))
    return [Term(t.name, views * t.forward, t.passes) for t in terms]


def simmim(model: ModelSpec, o: Any) -> list[Term]:
    patches, width = model.num_patches, SIZES[model.name].width
    return [*encoder(model, patches), Term("head", linear(patches, width, model.patch_values))]


FORMULAS: dict[str, Formula] = {
    "mae": mae,
    "cmae": cmae,
    "cae": cae,
    "mixedae": mixedae,
    "icmae": icmae,
    "simmim": simmim,
}


# ---- devices

# Dense bf16 products with fp32 accumulation, FLOP/s, from NVIDIA's data sheets (half the figure "with sparsity") and, for
# GeForce and RTX, from the architectures' white papers. First match wins.
PEAKS: list[tuple[str, float]] = [
    (r"B200\b", 2250e12),
    (r"H200 NVL\b", 835e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b", 165e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bRTX A6000\b", 155e12),
]


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that torch gives it; None if unknown, or for a slice of one (MIG)."""
    if "MIG" in device_name:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_name)), None)


def mfu(images_per_s: float, flops: Flops | None, peak: float | None) -> float | None:
    """Model FLOPs utilization in 0..1: what the published algorithm needs at this speed, by what the devices can do.

    Args:
        images_per_s: of the whole run, in bf16 or fp16: the peaks above mean nothing for fp32.
        peak: FLOP/s of all its devices together.
    """
    if flops is None or not peak:
        return None
    return images_per_s * flops.training / peak
