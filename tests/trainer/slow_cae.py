"""CAE written once more, slowly, in float64 and from its description alone; see slow_reference.py."""

import math

import fastmim_kernels as fk
import torch
from fastmim_pipelines.spec import Batch
from slow_reference import (
    SMALL,
    cut_view,
    draw_flips,
    draw_visible,
    layer_norm,
    linear,
    model_spec,
    patch_rows,
    position_table,
    scramble,
    softmax_attention,
    under,
)
from torch import nn
from torch.nn import functional as F

from fastmim.methods import cae

# (height, width, patch, channels)
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
WIDTH, DEPTH, HEADS = SMALL


class Brightness(nn.Module):
    """A tokenizer: the brightness of 3 x 3 pixels, and where it is brightest."""

    stride = 3

    def __init__(self, vocabulary=11):
        super().__init__()
        self.vocabulary, self.seen = vocabulary, []

    def forward(self, images, ids=None):
        self.seen.append((images, ids))
        squares = F.unfold(images, 3, stride=3).transpose(1, 2)
        tokens = (squares.mean(2) * 40).long() + squares.argmax(2)
        return (tokens if ids is None else tokens.gather(1, ids)) % self.vocabulary


def build(shape=SHAPES[0], seed=0, tokenizer=None, tokenizer_file=None, **options):
    torch.manual_seed(seed)
    defaults = dict(tokenizer=tokenizer_file, regressor_depth=2, decoder_depth=1, drop_path=0.4)
    method = cae.CAE(model_spec(*shape), cae.Config(**(defaults | options)), tokenizer)
    scramble(method, seed)
    return method


def make_batch(method, count=4, seed=0):
    """Random crops for all that the method asks for, and ids that are no row numbers."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(count, method.model.in_chans, *crop.size) for crop in method.crops]
    crops = tuple(torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for shape in shapes)
    return Batch(crops, torch.arange(count) * 7 + 100)


def slow_drops(rng, ids, peak, *depths):
    """Factors of each branch: [image][network][block] -> (attention, MLP)."""
    uniforms = fk.uniform(rng, ids, fk.Stream.DROP_PATH, 2 * sum(depths)).tolist()
    result = []
    for row in uniforms:
        draws, networks = iter(row), []
        for depth in depths:
            rates = [peak * i / max(1, depth - 1) for i in range(depth)]
            networks.append([tuple((next(draws) >= rate) / (1 - rate) for _ in range(2)) for rate in rates])
        result.append(networks)
    return result


def heads_of(q, k, v, heads):
    """Attention over whole widths, head by head."""
    d = q.shape[1] // heads
    parts = [slice(h * d, (h + 1) * d) for h in range(heads)]
    return torch.cat([softmax_attention(q[:, p], k[:, p], v[:, p]) for p in parts], 1)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_block(w, x, heads, drop):
    """x += drop gamma Attention(LN x); x += drop gamma MLP(LN x). Keys have no bias."""
    width, n = x.shape[1], layer_norm(w, "norm1", x)
    wq, wk, wv = (w["attn.qkv.weight"][i * width : (i + 1) * width] for i in range(3))
    out = heads_of(n @ wq.T + w["attn.qkv.q_bias"], n @ wk.T, n @ wv.T + w["attn.qkv.v_bias"], heads)
    x = x + drop[0] * w["gamma_1"] * linear(w, "attn.proj", out)
    hidden = gelu(linear(w, "fc1", layer_norm(w, "norm2", x)))
    return x + drop[1] * w["gamma_2"] * linear(w, "fc2", hidden)


def slow_encode(w, view, ids, patch, drops):
    """(M, D) of the given patches, class token left out at the end."""
    channels, _, width = view.shape
    kernel = w["patch_embed.weight"].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
    maps = F.conv2d(view[None], kernel, w["patch_embed.bias"], stride=patch)[0]
    columns = width // patch
    table = position_table(len(kernel), (view.shape[1] // patch, columns), "row")
    x = torch.stack([w["cls_token"][0, 0], *(maps[:, i // columns, i % columns] + table[1 + i] for i in ids)])
    for i, drop in enumerate(drops):
        x = slow_block(under(w, f"blocks.{i}"), x, HEADS, drop)
    return layer_norm(w, "norm", x)[1:]


def slow_regress(w, visible, p_visible, p_masked, heads, drops, quirk=None):
    """(M, D) by section 5's formulas; `quirk` changes one of them into what one would expect instead."""
    q = w["mask_token"][0].expand(len(p_masked), -1)
    positions = torch.cat([p_visible, p_masked])
    for i, drop in enumerate(drops):
        b = under(w, f"blocks.{i}")
        kv = torch.cat([visible, q])
        if quirk == "queries do not see each other":
            kv, positions = visible, p_visible
        values = kv + positions if quirk == "values have positions" else kv
        out = heads_of(
            linear(b, "attn.q", layer_norm(b, "norm_q", q + p_masked)),
            layer_norm(b, "norm_k", kv + positions) @ b["attn.k.weight"].T,
            linear(b, "attn.v", layer_norm(b, "norm_v", values)),
            heads,
        )
        start = q + p_masked if quirk == "residual has positions" else q
        a = start + drop[0] * b["gamma_1"] * linear(b, "attn.proj", out)
        n = layer_norm(b, "norm2", a)
        mlp = drop[1] * b["gamma_2"] * linear(b, "fc2", gelu(linear(b, "fc1", n)))
        q = (a if quirk == "MLP residual is not normalized" else n) + mlp
    return q if quirk == "no last norm" else layer_norm(w, "norm", q)


def slow_terms(
    method, weights, batch, rng, *, min_block, masked, depths=(2, 1), peak=0.4, cut=True, tokens=None, normalize=True
):
    """(decoder's loss, alignment, accuracy) in float64, image by image.

    Args:
        cut: the alignment target is a constant.
        min_block: of the block masks; None: any patches are masked.
        tokens: (B, L) token ids; None: the target is pixels.
        normalize: these, per patch.
    """
    m = method.model
    flips = draw_flips(rng, batch.ids)
    drops = slow_drops(rng, batch.ids, peak, DEPTH, DEPTH, *depths)
    count, heads = len(batch.ids), HEADS
    if min_block is None:
        visible = draw_visible(rng, batch.ids, m.num_patches, m.num_patches - masked)
        is_masked = [[i not in ids for i in range(m.num_patches)] for ids in visible]
    else:
        is_masked = fk.block_masking(rng, batch.ids, m.grid, masked, min_block=min_block).mask.tolist()
    decoded, align, right = 0.0, 0.0, 0
    for b in range(count):
        view = cut_view(batch.crops[0][b], m.image_size, 0, 0, flips[b], m.mean, m.std)
        hidden = [i for i in range(m.num_patches) if is_masked[b][i]]
        seen = [i for i in range(m.num_patches) if not is_masked[b][i]]
        assert len(hidden) == masked

        def encode(ids, drop, view=view):
            x = slow_encode(under(weights, "encoder"), view, ids, m.patch_size, drop)
            if any(name.startswith("bridge") for name in weights):
                x = layer_norm(weights, "bridge.1", linear(weights, "bridge.0", x))
            return x

        visible = encode(seen, drops[b][0])
        target = encode(hidden, drops[b][1])
        target = target.detach() if cut else target
        table = position_table(visible.shape[1], m.grid, "row")[1:]
        predicted = slow_regress(under(weights, "regressor"), visible, table[seen], table[hidden], heads, drops[b][2])
        align = align + 2.0 * ((predicted - target) ** 2).mean() / count
        x = predicted
        if depths[1]:
            x = x + table[hidden]
            for i, drop in enumerate(drops[b][3]):
                x = slow_block(under(weights, f"decoder.blocks.{i}"), x, heads, drop)
            x = layer_norm(weights, "decoder.norm", x)
        out = linear(weights, "decoder.head", x)
        if tokens is None:
            rows = patch_rows(view, m.patch_size)[hidden]
            if normalize:
                rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True) + 1e-6).sqrt()
            decoded = decoded + ((out - rows) ** 2).mean() / count
        else:
            for scores, i in zip(out, hidden, strict=True):
                label = int(tokens[b, i])
                loss = torch.log(torch.exp(scores).sum()) - scores[label]
                decoded = decoded + loss / (count * masked)
                right += int(scores.argmax()) == label
    return decoded, align, right / (count * masked)


def tokens_of(tokenizer, batch, rng):
    """(B, L) ids of the mirrored second crops."""
    flips = torch.tensor(draw_flips(rng, batch.ids)).view(-1, 1, 1, 1)
    images = batch.crops[1].float() / 255
    return tokenizer(torch.where(flips, images.flip(3), images))
