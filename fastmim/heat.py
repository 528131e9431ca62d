"""Heat maps of a transformer on whole images: large where it sees an object. Crops get their boxes from them (boxes.py).

The sum over the channels, which ContrastiveCrop takes of a convolutional network, is constant after a layer norm.
"""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from fastmim.blocks import attention
from fastmim.vit import Encoder


def class_attention(encoder: Encoder, patches: Tensor) -> Tensor:
    """Attention of the class token to the patches in the last block, mean over the heads. It needs a trained class token.

    Args:
        patches: (B, L, V), all of the image.

    Returns:
        (B, L) float32.
    """
    seen: list[Tensor] = []

    def watch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Products and a sum stay float32 under autocast, where a matrix product would not.
        scores = (q[:, :, :1].float() * k.float()).sum(-1) / math.sqrt(q.shape[-1])
        seen.append(scores.softmax(-1)[:, :, encoder.num_prefix :].mean(1))
        return attention(q, k, v)

    encoder(patches, attend=[attention] * (len(encoder.blocks) - 1) + [watch])
    return seen[0]


def distance_to_mean(encoder: Encoder, patches: Tensor) -> Tensor:
    """How far each token is from the mean token of its image, before the last layer norm, which would hide it."""
    seen: list[Tensor] = []
    hook = encoder.norm.register_forward_hook(lambda norm, given, results: seen.append(results[1]))
    try:
        encoder(patches)
    finally:
        hook.remove()
    tokens = seen[0][:, encoder.num_prefix :].float()
    return (tokens - tokens.mean(1, keepdim=True)).norm(dim=-1)


def similarity_to_mean(encoder: Encoder, patches: Tensor) -> Tensor:
    """Cosine between each token and the mean token of its image."""
    tokens = encoder(patches)[:, encoder.num_prefix :].float()
    return F.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=-1)


HEAT: dict[str, Callable[[Encoder, Tensor], Tensor]] = {
    "attn": class_attention,
    "feat": distance_to_mean,
    "sim": similarity_to_mean,
}
