"""What the ops of fastmim_kernels are compared with: the same results as official code and textbooks write them in torch.

Every function takes the arguments of the op of its name and works for any device; torch.compile takes them, too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify(images: Tensor, p: int) -> Tensor:
    """facebookresearch/mae models_mae.py `patchify`."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, (height // p) * (width // p), p * p * channels)


def normalized(images: Tensor, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    """torchvision's ToTensor and Normalize."""
    shift, scale = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return ((images.float() / 255 - shift) / scale).to(dtype)


def expanded(ids: Tensor, width: int) -> Tensor:
    return ids.unsqueeze(-1).repeat(1, 1, width)


def patchify_gather(images, ids, patch_size, *, mean, std, dtype=torch.float32):
    patches = patchify(normalized(images, mean, std, dtype), patch_size)
    return patches if ids is None else torch.gather(patches, 1, expanded(ids, patches.shape[2]))


def masked_pixel_loss(pred, images, ids_masked, patch_size, *, mean, std, norm=True, kind="mse"):
    """facebookresearch/mae models_mae.py `forward_loss`, for the masked patches that the decoder predicts."""
    target = patchify(normalized(images, mean, std, torch.float32), patch_size)
    average, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - average) / (variance + 1e-6) ** 0.5
    target = torch.gather(target, 1, expanded(ids_masked, target.shape[2]))
    return ((pred - target) ** 2).mean(-1).mean()


def gather_tokens(x, ids):
    """facebookresearch/mae models_mae.py `random_masking`."""
    return torch.gather(x, 1, expanded(ids, x.shape[2]))


def restore_tokens(x, mask_token, pos, ids_restore, num_prefix=1):
    """facebookresearch/mae models_mae.py `forward_decoder`."""
    missing = ids_restore.shape[1] + num_prefix - x.shape[1]
    full = torch.cat([x[:, num_prefix:], mask_token.view(1, 1, -1).repeat(x.shape[0], missing, 1)], 1)
    full = torch.gather(full, 1, expanded(ids_restore, x.shape[2]))
    return torch.cat([x[:, :num_prefix], full], 1) + pos


def random_masking(rng, ids, num_patches, num_keep):
    """facebookresearch/mae models_mae.py `random_masking`; other random numbers, of course."""
    noise = torch.rand(ids.shape[0], num_patches, device=ids.device)
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    mask = torch.ones(noise.shape, device=ids.device)
    mask[:, :num_keep] = 0
    return shuffle[:, :num_keep], shuffle[:, num_keep:], restore, torch.gather(mask, 1, restore)


def contrastive_loss(q, k, *, offset=0, temperature, label_smoothing=0.0):
    labels = torch.arange(offset, offset + q.shape[0], device=q.device)
    return F.cross_entropy(q @ k.T / temperature, labels, label_smoothing=label_smoothing)


def add_layer_norm(x, residual, weight, bias=None, *, scale=None, row_scale=None, eps=1e-6, prenorm=False):
    """timm's block: drop path and layer scale, addition, LayerNorm, all in the dtype of the stream."""
    if scale is not None:
        x = x * scale.to(x.dtype)
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).view(-1, 1, 1)
    h = x if residual is None else residual + x
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return (y, h) if prenorm else y


def topk_attention(q, k, v, topk, *, num_prefix=1, scale=None, labels=None):
    """Dense scores, topk, masked softmax."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    among = scores[..., num_prefix:, num_prefix:]
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    dropped[..., num_prefix:, num_prefix:] = among < among.topk(topk, -1).values[..., -1:]
    return scores.masked_fill(dropped, -torch.inf).softmax(-1) @ v


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def gelu_linear(x, weight, bias=None):
    return F.linear(F.gelu(x), weight, bias)


def bias_gelu(x, bias=None):
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def ema_update(targets, onlines, momentum):
    """The loop that momentum encoders are published with."""
    for target, online in zip(targets, onlines, strict=True):
        target.mul_(momentum).add_(online, alpha=1 - momentum)


def adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, weight_decay, grad_scale, betas=(0.9, 0.95), eps=1e-8, targets,
    momentum, copies=None,
):  # fmt: skip
    """torch's fused AdamW with clipped gradients, then the moving average, then the copy, each multi-tensor."""
    grads = torch._foreach_mul([g.float() for g in grads], grad_scale)
    steps = [torch.tensor(float(step - 1), device=p.device) for p in params]
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    pairs = [(t, p) for t, p in zip(targets, params, strict=True) if t is not None]
    torch._foreach_lerp_(*(list(column) for column in zip(*pairs, strict=True)), 1 - momentum)
    if copies is not None:
        torch._foreach_copy_(copies, params)


def random_resized_crop(images, boxes, size, *, interpolation, flip, mean, std, dtype=torch.uint8):
    """torchvision's RandomResizedCrop, RandomHorizontalFlip and Normalize, image by image."""
    views = []
    for image, (left, top, width, height) in zip(images, boxes.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        views.append(F.interpolate(crop.float(), size, mode=interpolation, antialias=True))
    x = torch.cat(views).round_().clamp_(0, 255)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    if mean is not None:
        x = normalized(x, mean, std, dtype)
    return x.to(dtype)
