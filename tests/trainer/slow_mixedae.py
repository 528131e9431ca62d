"""MixedAE written once more, slowly, in float64 and from its description alone; see slow_reference.py."""

import math

import torch
from fastmim_kernels import Stream, random_words
from slow_reference import (
    SMALL,
    block,
    count_blocks,
    cut_view,
    draw_flips,
    layer_norm,
    linear,
    make_batch,
    model_spec,
    patch_rows,
    pixel_loss,
    position_table,
    scramble,
    under,
)

from fastmim.methods import mixedae

# (height, width, patch, channels): 24 patches but for the last
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
DECODER = dict(decoder_width=32, decoder_depth=2, decoder_heads=4)
NAIVE = dict(homologous="none", use_segments=False, contrast_weight=0.0)

# The ablation's rows first.
GRID = {
    "naive": NAIVE,
    "segments": NAIVE | dict(use_segments=True),
    "topk": NAIVE | dict(homologous="topk"),
    "topk_segments": dict(contrast_weight=0.0),
    "all": {},
    "oracle": NAIVE | dict(homologous="oracle"),
    "oracle_all": dict(homologous="oracle"),
    "no_class_token": dict(cls_mode="none"),
    "oracle_no_class_token": dict(homologous="oracle", cls_mode="none"),
    "naive_no_class_token": NAIVE | dict(cls_mode="none"),
    "class_per_image": dict(cls_mode="per_image", diagnostics=True),
    "oracle_class_per_image": dict(homologous="oracle", cls_mode="per_image", mode="full", members=3),
    "naive_class_per_image": dict(homologous="none", cls_mode="per_image", members=2),
    "unequal_class_per_image": dict(members=5, topk=3, homo_layers=1, cls_mode="per_image", diagnostics=True),
    "full": dict(mode="full", members=3),
    "unequal_shares": dict(members=5),
    "unequal_shares_full": dict(members=5, mode="full"),
    "pixels": dict(norm_pix=False, members=2),
    "mlp": dict(projection="mlp", contrast_weight=0.3, temperature=0.1),
    "all_but_first": dict(homo_layers="all_but_first"),
    "last_1": dict(homo_layers=1, topk=3),
    "diagnostics_full": dict(diagnostics=True, mode="full", members=3, cls_mode="none"),
    "diagnostics_naive": NAIVE | dict(diagnostics=True),
    "diagnostics_oracle": dict(diagnostics=True, homologous="oracle"),
}


def build(shape=SHAPES[0], seed=0, **options):
    torch.manual_seed(seed)
    method = mixedae.MixedAE(model_spec(*shape), mixedae.Config(**(DECODER | options)))
    scramble(method, seed)
    return method


def groups_of(method, count=2, seed=0):
    return make_batch(method, count * method.config.members, seed=seed)


def draw_sources(rng, ids, patches, members):
    """Per group the member of each position: positions in the order of their words are dealt out one by one."""
    rows = []
    for words in random_words(rng, ids[::members], Stream.MIX, patches).tolist():
        row = [None] * patches
        for place, position in enumerate(sorted(range(patches), key=lambda p: (words[p], p))):
            row[position] = place % members
        rows.append(row)
    return rows


def allowed_keys(scores, owners, kind, topk):
    """Per query the keys that it may attend to, of the tokens of one mixture; scores as nested lists.

    Args:
        owners: per token the image that it is of, and whether it is a patch; the image is None for a token of all images.
    """
    keys = []
    places = range(len(scores))
    patches = [j for j in places if owners[j][1]]
    classes = [j for j in places if not owners[j][1]]
    for i, (image, is_patch) in enumerate(owners):
        chosen, others = patches, classes
        if kind == "topk" and image is not None:
            least = sorted((scores[i][j] for j in patches), reverse=True)[topk - 1]
            chosen = [j for j in patches if scores[i][j] >= least]
            others = classes if is_patch else [i]
        if kind == "oracle" and image is not None:
            chosen = [j for j in patches if owners[j][0] == image]
            others = [j for j in classes if owners[j][0] in (None, image)]
        keys.append(others + chosen)
    return keys


def mixed_block(w, x, heads, owners, kind, topk, seen):
    """Pre-norm block on the tokens (N, D) of one mixture.

    Args:
        seen: lists to which is added, per head and patch, the share of its keys that are chosen rightly ("right"), and the
            share of its attention to patches that its own image gets ("own").
    """
    width = x.shape[1]
    d = width // heads
    qkv = linear(w, "attn.qkv", layer_norm(w, "norm1", x))
    outputs = []
    for h in range(heads):
        q, k, v = (qkv[:, third * width + h * d : third * width + (h + 1) * d] for third in range(3))
        scores = q @ k.T / math.sqrt(d)
        rows = []
        for i, chosen in enumerate(allowed_keys(scores.tolist(), owners, kind, topk)):
            weights = torch.exp(scores[i, chosen])
            rows.append((weights / weights.sum()) @ v[chosen])
            if owners[i][1]:
                paid = {j: float(weight.detach()) for j, weight in zip(chosen, weights) if owners[j][1]}
                right = [j for j in paid if owners[j][0] == owners[i][0]]
                seen["right"].append(len(right) / topk)
                seen["own"].append(sum(paid[j] for j in right) / sum(paid.values()))
        outputs.append(torch.stack(rows))
    x = x + linear(w, "attn.proj", torch.cat(outputs, 1))
    hidden = linear(w, "fc1", layer_norm(w, "norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(w, "fc2", hidden)


def slow_encode(method, weights, views, row, kinds, topk, has_segments=True):
    """Tokens of one mixture (its class tokens first), how many class tokens there are, and what each layer has seen."""
    m, w, cls_mode = method.model, under(weights, "encoder"), method.config.cls_mode
    segments = weights["segments.weight"] if has_segments and "segments.weight" in weights else None
    embedded = [linear(w, "patch_embed", patch_rows(view, m.patch_size)) for view in views]
    table = position_table(embedded[0].shape[1], m.grid, "column")
    shown = {"shared": [None], "per_image": list(range(len(views))), "none": []}[cls_mode]
    owners = [(image, False) for image in shown] + [(member, True) for member in row]
    tokens = [w["cls_token"][0, 0] + table[0] for _ in shown]
    tokens += [embedded[member][position] + table[1 + position] for position, member in enumerate(row)]
    if segments is not None:
        tokens = [t if image is None else t + segments[image] for t, (image, _) in zip(tokens, owners)]
    x, layers = torch.stack(tokens), []
    for i, kind in enumerate(kinds):
        layers.append({"right": [], "own": []})
        x = mixed_block(under(w, f"blocks.{i}"), x, SMALL[2], owners, kind, topk, layers[-1])
    return layer_norm(w, "norm", x), len(shown), layers


def slow_decode(method, weights, latent, row, member):
    """(L, values) of one image from the tokens of its mixture."""
    w = under(weights, "decoder")
    embedded = linear(w, "embed", latent)
    table = position_table(embedded.shape[1], method.model.grid, "column")
    classes = len(latent) - len(row)
    tokens = [embedded[member if classes > 1 else 0] + table[0]] if classes else []
    first = len(tokens)
    for position, owner in enumerate(row):
        token = embedded[classes + position] if owner == member else w["mask_token"][0, 0]
        tokens.append(token + table[1 + position])
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, DECODER["decoder_heads"])
    return linear(w, "pred", layer_norm(w, "norm", x))[first:]


def slow_contrast(features, row, temperature):
    """Sum of the patches' terms in one mixture."""
    u = features / torch.sqrt((features**2).sum(1, keepdim=True))
    s = u @ u.T / temperature
    total = 0
    for i in range(len(row)):
        partners = [p for p in range(len(row)) if p != i and row[p] == row[i]]
        others = torch.log(sum(torch.exp(s[i, a]) for a in range(len(row)) if a != i))
        total = total - sum(s[i, p] - others for p in partners) / len(partners)
    return total


def slow_terms(method, weights, batch, rng):
    """(pixel loss, contrastive loss without its weight, measures) from the options alone."""
    c, m = method.config, method.model
    patches, members, depth = m.num_patches, c.members, SMALL[1]
    topk = patches // members if c.topk is None else c.topk
    first = {"all": 0, "all_but_first": 1}.get(c.homo_layers, depth - 1)
    kinds = [c.homologous if i >= first else "none" for i in range(depth)]
    flips = draw_flips(rng, batch.ids)
    views = [cut_view(x, m.image_size, 0, 0, f, m.mean, m.std) for x, f in zip(batch.crops[0], flips)]
    pixels, contrasts, seen = [], [], {}
    for turn in range(members if c.mode == "full" else 1):
        preds, hidden, contrast, count = [], [], 0, 0
        for g, drawn in enumerate(draw_sources(rng, batch.ids, patches, members)):
            row = [(member + turn) % members for member in drawn]
            own = views[g * members : (g + 1) * members]
            latent, classes, layers = slow_encode(method, weights, own, row, kinds, topk)
            _, _, unaided = slow_encode(method, weights, own, row, kinds, topk, has_segments=False)
            for i in range(depth):
                seen.setdefault(f"topk_accuracy/{i:02d}", []).extend(layers[i]["right"])
                for h in range(SMALL[2]):
                    right = layers[i]["right"][h * patches : (h + 1) * patches]
                    seen.setdefault(f"topk_accuracy_of_head/{i:02d}.{h:02d}", []).extend(right)
                seen.setdefault(f"own_attention/{i:02d}", []).extend(layers[i]["own"])
                seen.setdefault(f"topk_accuracy_without_segments/{i:02d}", []).extend(unaided[i]["right"])
            for member in range(members):
                preds.append(slow_decode(method, weights, latent, row, member))
                hidden.append([p for p in range(patches) if row[p] != member])
            features = latent[classes:]
            if c.projection == "mlp" and "projector.0.weight" in weights:
                x = linear(weights, "projector.0", features)
                features = linear(weights, "projector.2", 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
            contrast = contrast + slow_contrast(features, row, c.temperature)
            count += patches
        pixels.append(pixel_loss(preds, views, hidden, m.patch_size, c.norm_pix))
        contrasts.append(contrast / count)
    wanted = {f"topk_accuracy/{i:02d}" for i in range(depth) if kinds[i] == "topk"}
    if c.diagnostics:
        wanted |= {f"topk_accuracy_of_head/{name[-2:]}.{h:02d}" for name in set(wanted) for h in range(SMALL[2])}
        wanted |= {f"own_attention/{i:02d}" for i in range(depth)}
        if c.use_segments:
            wanted |= {
                name.replace("accuracy/", "accuracy_without_segments/") for name in wanted if "accuracy/" in name
            }
    measures = {name: sum(seen[name]) / len(seen[name]) for name in wanted}
    return sum(pixels) / len(pixels), sum(contrasts) / len(contrasts), measures
