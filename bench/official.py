"""Training steps the way official codes take them, on the weights of our methods: what ours are compared with.

The arithmetic is facebookresearch/mae's and ZhichengHuang/CMAE's: normalized float images, all patches embedded by a
convolution, attention written out, decoders and prediction on all tokens, targets made in float32, a Python loop for the
average, the loss read every step. The parameters are our modules', so that a step can be checked against ours.
"""

import torch
from fastmim_kernels import shift_flip_jitter
from plain_torch import expanded, normalized, patchify
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.views import random_color, random_flip, random_shift


def dense(layer: nn.Linear, x: Tensor) -> Tensor:
    """torch's own product with the weights of ours."""
    return F.linear(x, layer.weight, layer.bias)


def normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """torch's own norm with the weights of ours."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps) if hasattr(norm, "weight") else x


class Official(nn.Module):
    """The forward pass of MAE or CMAE over one of our methods.

    Args:
        method: whose modules are used.
        fused_attention: torch's, instead of products and softmax.
    """

    def __init__(self, method: nn.Module, *, fused_attention: bool = False):
        super().__init__()
        self.method, self.fused_attention = method, fused_attention
        self.is_cmae = hasattr(method, "feature_decoder")

    # -- parts

    def attention(self, part: nn.Module, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = dense(part.qkv, x).reshape(batch, length, 3, part.heads, width // part.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attention:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return dense(part.proj, x.transpose(1, 2).reshape(batch, length, width))

    def blocks(self, parts: nn.ModuleList, x: Tensor) -> Tensor:
        for block in parts:
            x = x + self.attention(block.attn, normed(block.norm1, x))
            x = x + dense(block.fc2, F.gelu(dense(block.fc1, normed(block.norm2, x))))
        return x

    def encode(self, encoder: nn.Module, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        m, width = self.method.model, encoder.width
        p = m.patch_size
        weight = encoder.patch_embed.weight.view(width, p, p, m.in_chans).permute(0, 3, 1, 2)
        x = F.conv2d(images, weight, encoder.patch_embed.bias, stride=p).flatten(2).transpose(1, 2)
        x = x + encoder.position[1:]
        if ids_keep is not None:
            x = torch.gather(x, 1, expanded(ids_keep, width))
        cls = (encoder.cls_token + encoder.position[:1]).expand(len(x), -1, -1)
        return normed(encoder.norm, self.blocks(encoder.blocks, torch.cat([cls, x], dim=1)))

    def decode(self, decoder: nn.Module, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predictions for all patches."""
        x = dense(decoder.embed, latent)
        missing = ids_restore.shape[1] + 1 - x.shape[1]
        full = torch.cat([x[:, 1:], decoder.mask_token.repeat(len(x), missing, 1).to(x.dtype)], dim=1)
        full = torch.gather(full, 1, expanded(ids_restore, x.shape[2]))
        x = torch.cat([x[:, :1], full], dim=1) + decoder.position
        return dense(decoder.pred, normed(decoder.norm, self.blocks(decoder.blocks, x)))[:, 1:]

    def pixel_loss(self, pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        target = patchify(images, self.method.model.patch_size)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        loss = (pred - (target - mean) / (variance + 1e-6) ** 0.5) ** 2
        return (loss.mean(dim=-1) * mask).sum() / mask.sum()

    # -- methods

    def forward(self, images: Tensor, other: Tensor | None, noise: Tensor) -> Tensor:
        """Normalized views (the second for CMAE's target), and noise (B, L) whose order is the mask -> loss."""
        method = self.method
        order = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(order, dim=1)
        ids_keep = order[:, : method.mask.num_keep * (method.config.mask_cell**2 if self.is_cmae else 1)]
        mask = torch.ones_like(noise).scatter_(1, ids_keep, 0.0)
        latent = self.encode(method.encoder, images, ids_keep)
        decoder = method.pixel_decoder if self.is_cmae else method.decoder
        loss = self.pixel_loss(self.decode(decoder, latent, ids_restore), images, mask)
        if self.is_cmae:
            feature = self.decode(method.feature_decoder, latent, ids_restore).mean(dim=1)
            query = F.normalize(method.predictor(method.projector(feature)), dim=-1)
            with torch.no_grad():
                tokens = self.encode(method.target_encoder, other, None)[:, 1:]
                key = F.normalize(method.target_projector(tokens.mean(dim=1)), dim=-1)
            tau = method.config.temperature
            scores = query.float() @ key.float().T / tau
            loss = loss + 2 * tau * F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
        return loss


def views(method: nn.Module, batch, rng: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the official loaders' workers would hand over: normalized float images. Not part of a step."""
    m = method.model
    if not hasattr(method, "feature_decoder"):
        flip = random_flip(rng, batch.ids)
        images = torch.where(flip.view(-1, 1, 1, 1), batch.crops[0].flip(3), batch.crops[0])
        return normalized(images, m.mean, m.std, torch.float32), None
    window = dict(size=m.image_size, flip=random_flip(rng, batch.ids), mean=m.mean, std=m.std)
    shift = random_shift(rng, batch.ids, method.shift)
    other = shift_flip_jitter(
        batch.crops[0], offset=shift, **window, **random_color(rng, batch.ids, method.config.color)
    )
    return shift_flip_jitter(batch.crops[0], **window), other


def order_of(method: nn.Module, batch, rng: Tensor) -> Tensor:
    """Noise (B, L) in whose order lies the mask that our method draws."""
    return method.mask(rng, batch.ids).ids_restore.float()
