"""ICMAE written once more, slowly, in float64 and from its description alone; see slow_reference.py."""

import math

import torch
from fastmim_kernels import Stream, uniform
from slow_reference import (
    SMALL,
    batch_norm,
    block,
    count_blocks,
    cut_view,
    doubles,
    draw_visible,
    info_nce,
    layer_norm,
    linear,
    patch_rows,
    pixel_loss,
    position_table,
    under,
)
from torch.nn import functional as F

HEADS, DECODER_HEADS, KEPT = SMALL[2], 4, 6  # floor(24 x .25) visible patches


def draw_flips(rng, ids) -> list[list[bool]]:
    """Per view, per image."""
    return (uniform(rng, ids, Stream.FLIP, 2) < 0.5).T.tolist()


def slow_views(method, batch, rng, second=None) -> list[list[torch.Tensor]]:
    """The two views of each image; the second may be given, in 0 .. 1, as the view op made it."""
    m = method.model
    views = [
        [cut_view(c, m.image_size, 0, 0, f, m.mean, m.std) for c, f in zip(crops, flips, strict=True)]
        for crops, flips in zip(batch.crops, draw_flips(rng, batch.ids), strict=True)
    ]
    if second is not None:
        mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (m.mean, m.std))
        views[1] = [(view.double() - mean) / std for view in second]
    return views


def slow_masks(method, rng, ids, kept=KEPT) -> list[list[list[int]]]:
    """Visible patches of each view and image, in their order."""
    count, share = method.model.num_patches, method.config.mask_share
    orders = draw_visible(rng, ids, count, count)
    first = [order[:kept] for order in orders]
    if share == "same":
        return [first, first]
    if share == "complement":
        return [first, [order[kept : 2 * kept] for order in orders]]
    noise = uniform(rng, ids, Stream.MASK, 2 * count)[:, count:].tolist()
    return [first, [sorted(range(count), key=lambda i: row[i])[:kept] for row in noise]]


def slow_encode(w, view, visible, patch, dropped=0, no_position=None) -> torch.Tensor:
    """(1 + K, D) of one image; the first `dropped` visible patches get `no_position` in the place of theirs."""
    rows = patch_rows(view, patch)
    grid = (view.shape[1] // patch, view.shape[2] // patch)
    table = position_table(w["patch_embed.weight"].shape[0], grid, "column")
    tokens = [w["cls_token"][0, 0]]
    for n, i in enumerate(visible):
        tokens.append(linear(w, "patch_embed", rows[i]) + (no_position if n < dropped else table[1 + i]))
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, HEADS)
    return layer_norm(w, "norm", x)


def slow_decode(w, latent, visible, grid) -> torch.Tensor:
    """(1 + L, V) of one image: the class token's slot comes first."""
    embedded = linear(w, "embed", latent)
    table = position_table(embedded.shape[1], grid, "column")
    tokens = [embedded[0]]
    for i in range(grid[0] * grid[1]):
        tokens.append((embedded[1 + visible.index(i)] if i in visible else w["mask_token"][0, 0]) + table[1 + i])
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, DECODER_HEADS)
    return linear(w, "pred", layer_norm(w, "norm", x))


def slow_head(w, x) -> torch.Tensor:
    """Linear, batch norm, ReLU, ..., linear, batch norm without weight and bias; no linear map has a bias."""
    assert not [n for n in w if n.endswith("bias") and int(n.split(".")[0]) % 3 == 0]
    places = sorted({int(name.split(".")[0]) for name in w if int(name.split(".")[0]) % 3 == 0})
    for place in places:
        x = x @ w[f"{place}.weight"].T
        ones = torch.ones(x.shape[1], dtype=torch.float64)
        is_last = place == places[-1]
        weight = ones if is_last else w[f"{place + 1}.weight"]
        x = batch_norm(x, weight, 0 * ones if is_last else w[f"{place + 1}.bias"], eps=1e-5)
        if not is_last:
            x = torch.where(x > 0, x, torch.zeros_like(x))
    return x


def slow_position(w, latent, visible, mode, predicted) -> tuple[torch.Tensor, float]:
    """Mean over images and predicted tokens (and for sd_mse over the logits); share of right places."""
    losses, right = [], []
    for z, ids in zip(latent, visible, strict=True):
        for n in range(predicted):
            logits = linear(w, "1", linear(w, "0", z[1 + n]))
            if mode == "ce":
                losses.append(torch.log(torch.exp(logits).sum()) - logits[ids[n]])
            else:
                one_hot = torch.tensor([float(i == ids[n]) for i in range(len(logits))], dtype=torch.float64)
                losses.append(((logits - one_hot) ** 2).sum() / len(logits))
            right.append(int(logits.argmax()) == ids[n])
    return sum(losses) / len(losses), sum(right) / len(right)


def slow_vectors(method, weights, latents, decoded, views, masks) -> tuple[list, list]:
    """(queries, keys) of both views; no query of a view without latents."""
    mode, patch = method.config.contrast, method.model.patch_size
    queries, keys = [], []
    for view in range(2):
        if mode == "enc_cls":
            online = torch.stack([z[0] for z in latents[view]]) if view < len(latents) else None
            w = under(weights, "target_encoder")
            seen = [slow_encode(w, x, ids, patch) for x, ids in zip(views[view], masks[view], strict=True)]
            target = torch.stack([z[0] for z in seen])
        else:
            summaries = []
            for name in ("class_blocks", "target_class_blocks"):
                w, rows = under(weights, name), []
                for x in decoded[view]:
                    for i in range(2):
                        x = block(under(w, f"blocks.{i}"), x, HEADS)
                    rows.append(x[0])
                summaries.append(torch.stack(rows))
            online, target = summaries
        if online is not None:
            queries.append(slow_head(under(weights, "predictor"), slow_head(under(weights, "projector"), online)))
        keys.append(slow_head(under(weights, "target_projector"), target).detach())
    return queries, keys


def slow_parts(method, weights, batch, rng, second=None, strangers=(), label_offset=0) -> dict[str, torch.Tensor]:
    """All terms as they enter the loss, with the published weights, and the share of right places."""
    m, config = method.model, method.config
    views, masks = slow_views(method, batch, rng, second), slow_masks(method, rng, batch.ids)
    dropped = round(config.pos_drop * KEPT)
    no_position = weights.get("position_drop.vector")
    encoder, decoder = under(weights, "encoder"), under(weights, "decoder")
    latents = [
        [slow_encode(encoder, x, ids, m.patch_size, dropped, no_position) for x, ids in zip(*both, strict=True)]
        for both in zip(views, masks, strict=True)
    ]
    if config.second_view == "key":
        latents = latents[:1]
    decoded = [
        [slow_decode(decoder, z, ids, m.grid) for z, ids in zip(*both, strict=True)] for both in zip(latents, masks)
    ]
    parts = {}
    for name, preds, xs, visible in zip("ab", decoded, views, masks):
        masked = [[i for i in range(m.num_patches) if i not in ids] for ids in visible]
        parts[f"pixel_{name}"] = pixel_loss([p[1:] for p in preds], xs, masked, m.patch_size, config.norm_pix)
    if config.position != "none":
        w = under(weights, "position_head")
        found = [slow_position(w, z, ids, config.position, dropped or KEPT) for z, ids in zip(latents, masks)]
        parts["position"] = {"ce": 0.1, "sd_mse": 1.0}[config.position] * sum(loss for loss, _ in found)
        parts["accuracy"] = sum(right for _, right in found) / len(found)
    if config.contrast != "none":
        tau = {"enc_cls": 0.2, "sd_dec": 1.0}[config.contrast]
        queries, (k_a, k_b) = slow_vectors(method, weights, latents, decoded, views, masks)
        pairs = list(zip(queries, (k_b, k_a)))
        labels = [label_offset + i for i in range(len(k_a))]
        before, after = strangers[:label_offset], strangers[label_offset:]
        gathered = [torch.cat([*before, *k, *after]).view(-1, k.shape[1]) for _, k in pairs]
        parts["contrast"] = 0.1 * 2 * tau * sum(info_nce(q, k, labels, tau) for q, k in zip(queries, gathered))
        cosines = [F.normalize(q, dim=1) @ F.normalize(k, dim=1).T for q, k in pairs]
        parts["positive"] = sum(c.diag().mean() for c in cosines).item() / len(cosines)
        parts["mean"] = sum(c.mean() for c in cosines).item() / len(cosines)
    return parts


def slow_heat(method, image) -> torch.Tensor:
    """Of the last block, by the formulas: attention of the class token, one head after the other; or tokens and their mean."""
    m, kind, w = method.model, method.config.heat, under(doubles(method), "encoder")
    rows = patch_rows(cut_view(image, m.image_size, 0, 0, False, m.mean, m.std), m.patch_size)
    width, last = w["patch_embed.weight"].shape[0], count_blocks(w) - 1
    table = position_table(width, m.grid, "column")
    x = torch.cat([w["cls_token"][0], linear(w, "patch_embed", rows) + table[1:]])
    for i in range(last):
        x = block(under(w, f"blocks.{i}"), x, HEADS)
    if kind != "attn":
        x = block(under(w, f"blocks.{last}"), x, HEADS)
        tokens = x[1:] if kind == "feat" else layer_norm(w, "norm", x)[1:]
        mean = tokens.sum(0) / len(tokens)
        if kind == "feat":
            return torch.stack([((t - mean) ** 2).sum().sqrt() for t in tokens]).view(m.grid)
        return torch.stack([t @ mean / (t @ t * (mean @ mean)).sqrt() for t in tokens]).view(m.grid)
    w = under(w, f"blocks.{last}")
    qkv = linear(w, "attn.qkv", layer_norm(w, "norm1", x))
    d, maps = width // HEADS, []
    for h in range(HEADS):
        q, k = qkv[0, h * d : (h + 1) * d], qkv[:, width + h * d : width + (h + 1) * d]
        scores = torch.exp(k @ q / math.sqrt(d))
        maps.append((scores / scores.sum())[1:])
    return (sum(maps) / HEADS).view(m.grid)
