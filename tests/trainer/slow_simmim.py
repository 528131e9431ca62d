"""SimMIM written once more, slowly, in float64 and from the published code's formulas; see slow_reference.py."""

import math

import torch
from fastmim_kernels import Stream, uniform
from slow_reference import (
    SMALL,
    cells_to_patches,
    count_blocks,
    cut_view,
    draw_flips,
    draw_visible,
    layer_norm,
    linear,
    model_spec,
    patch_rows,
    scramble,
    under,
)

from fastmim.methods import simmim

# (height, width, patch, channels) and the side of a cell in patches.
SHAPES = [((16, 24, 4, 3), 2), ((24, 16, 4, 1), 2), ((12, 20, 4, 5), 1)]
IDS = ["x".join(map(str, shape)) + f"-cell{cell}" for shape, cell in SHAPES]


def build(shape=SHAPES[0][0], cell=2, seed=0, **options):
    torch.manual_seed(seed)
    method = simmim.SimMIM(model_spec(*shape), simmim.Config(mask_cell=cell, **({"drop_path": 0.5} | options)))
    scramble(method, seed)
    return method


def slow_bias(table, grid):
    """(heads, 1 + L, 1 + L): row of the table by the offset of query and key; the last three rows are the class token's."""
    h, w = grid
    places = [None] + [(row, column) for row in range(h) for column in range(w)]
    rows = []
    for query in places:
        row = []
        for key in places:
            if query is None and key is None:
                entry = len(table) - 1
            elif query is None:
                entry = len(table) - 3
            elif key is None:
                entry = len(table) - 2
            else:
                entry = (query[0] - key[0] + h - 1) * (2 * w - 1) + query[1] - key[1] + w - 1
            row.append(table[entry])
        rows.append(torch.stack(row))
    return torch.stack(rows).permute(2, 0, 1)


def slow_block(w, x, heads, bias, drop):
    width = x.shape[1]
    d = width // heads
    qkv = layer_norm(w, "norm1", x) @ w["attn.qkv.weight"].T
    q, k, v = qkv[:, :width] + w["attn.qkv.q_bias"], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    v = v + w["attn.qkv.v_bias"]
    outputs = []
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        scores = torch.exp(q[:, s] @ k[:, s].T / math.sqrt(d) + bias[h])
        outputs.append(scores / scores.sum(1, keepdim=True) @ v[:, s])
    x = x + drop[0] * w["gamma_1"] * linear(w, "attn.proj", torch.cat(outputs, 1))
    hidden = linear(w, "fc1", layer_norm(w, "norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + drop[1] * w["gamma_2"] * linear(w, "fc2", hidden)


def slow_encode(w, view, masked, patch, heads, drops=None):
    """(1 + L, D): every patch is embedded, and those of `masked` are replaced by the token."""
    grid = (view.shape[1] // patch, view.shape[2] // patch)
    tokens = linear(w, "patch_embed", patch_rows(view, patch))
    rows = [w["cls_token"][0, 0]]
    rows += [w["mask_token"][0, 0] if i in masked else tokens[i] for i in range(len(tokens))]
    x, bias = torch.stack(rows), slow_bias(w["relative_bias.table"], grid)
    for i in range(count_blocks(w)):
        x = slow_block(under(w, f"blocks.{i}"), x, heads, bias, (1, 1) if drops is None else drops[i])
    return layer_norm(w, "norm", x)


def slow_drops(rng, ids, largest, depth):
    """Per image and block the factors of the two branches: rates rise evenly from 0 to the largest."""
    numbers = uniform(rng, ids, Stream.DROP_PATH, 2 * depth).double().tolist()
    factors = []
    for row in numbers:
        per_block = []
        for i in range(depth):
            rate = largest * i / (depth - 1)
            per_block.append([0.0 if u < rate else 1 / (1 - rate) for u in row[2 * i : 2 * i + 2]])
        factors.append(per_block)
    return factors


def masked_of(method, batch, rng, cell, cells_masked):
    h, w = method.model.grid
    cells = (h // cell) * (w // cell)
    visible = draw_visible(rng, batch.ids, cells, cells - cells_masked)
    return [[p for p in range(h * w) if p not in cells_to_patches(kept, method.model.grid, cell)] for kept in visible]


def slow_loss(method, weights, batch, rng, cell, cells_masked, drop_path, norm_pix=False):
    """The source's loss: absolute errors of the masked pixels in the picture, by their number, by the channels.

    norm_pix: the pixels of each patch are first brought to mean 0 and (unbiased) variance 1.
    """
    m, (_, depth, heads) = method.model, SMALL
    drops = slow_drops(rng, batch.ids, drop_path, depth)
    total, pixels = 0.0, 0
    for i, masked in enumerate(masked_of(method, batch, rng, cell, cells_masked)):
        view = cut_view(batch.crops[0][i], m.image_size, 0, 0, draw_flips(rng, batch.ids)[i], m.mean, m.std)
        tokens = slow_encode(under(weights, "encoder"), view, masked, m.patch_size, heads, drops[i])
        pred = linear(weights, "head", tokens[1:])
        for p in masked:
            top, left = p // m.grid[1] * m.patch_size, p % m.grid[1] * m.patch_size
            if norm_pix:
                patch = view[:, top : top + m.patch_size, left : left + m.patch_size]
                patch[:] = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            for y in range(m.patch_size):
                for x in range(m.patch_size):
                    values = pred[p, (y * m.patch_size + x) * m.in_chans :][: m.in_chans]
                    total = total + (view[:, top + y, left + x] - values).abs().sum()
                    pixels += 1
    return total / (pixels + 1e-5) / m.in_chans
