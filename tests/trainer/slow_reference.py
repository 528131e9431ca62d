"""MAE and CMAE written once more, slowly, in float64 and from the specifications alone.

Nothing here calls fastmim.vit or a kernel, except for the uniform numbers themselves (`draw_*`). Weights come as a dict
of tensors by parameter name; gradients flow through them. One image at a time, loops where a loop is plainer.
"""

import functools
import math
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = (48, 2, 3)
"""Width, depth, heads that the tests put in the place of vit_tiny's."""


# ---------------------------------------------------------------- material


def model_spec(height=16, width=24, patch=4, chans=3, name="vit_tiny"):
    from fastmim.config import ModelSpec

    mean, std = (0.45, 0.5, 0.4, 0.55, 0.35), (0.25, 0.2, 0.3, 0.22, 0.27)
    return ModelSpec(name, (height, width), patch, chans, mean[:chans], std[:chans])


def make_batch(method, count=4, first_id=100, seed=0):
    """Random master crops of the method's size, and ids that are no row numbers."""
    from fastmim_pipelines.spec import Batch

    g = torch.Generator().manual_seed(seed)
    shape = (count, method.model.in_chans, *method.crops[0].size)
    return Batch((torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),), torch.arange(count) * 7 + first_id)


def make_rng(seed=3, step=11) -> Tensor:
    return torch.tensor([seed, step])


def scramble(module: nn.Module, seed=0, amount=0.1) -> None:
    """Moves every parameter off its initial value: no bias is 0, no scale 1, no target equals its online twin."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=g))


def doubles(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, as float64 leaves."""
    return {n: p.detach().double().requires_grad_(p.requires_grad) for n, p in module.named_parameters()}


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix + "."): w for n, w in weights.items() if n.startswith(prefix + ".")}


# ---------------------------------------------------------------- random draws


def draw_flips(rng: Tensor, ids: Tensor) -> list[bool]:
    from fastmim_kernels import Stream, uniform

    return [float(u) < 0.5 for u in uniform(rng, ids, Stream.FLIP, 1)[:, 0]]


def draw_shifts(rng: Tensor, ids: Tensor, largest: int) -> list[tuple[int, int]]:
    from fastmim_kernels import Stream, uniform

    return [tuple(math.floor(float(u) * (largest + 1)) for u in pair) for pair in uniform(rng, ids, Stream.SHIFT, 2)]


def draw_visible(rng: Tensor, ids: Tensor, units: int, kept: int) -> list[list[int]]:
    """Per image the units (patches or cells) with the smallest noise, in the order of the noise."""
    from fastmim_kernels import Stream, uniform

    noise = uniform(rng, ids, Stream.MASK, units).tolist()
    return [sorted(range(units), key=lambda unit: row[unit])[:kept] for row in noise]


def cells_to_patches(cells: list[int], grid: tuple[int, int], cell: int) -> list[int]:
    """Patches of the given cells, in raster order."""
    per_row = grid[1] // cell
    return [
        row * grid[1] + column
        for row in range(grid[0])
        for column in range(grid[1])
        if (row // cell) * per_row + column // cell in cells
    ]


# ---------------------------------------------------------------- pixels


def cut_view(crop: Tensor, size, top: int, left: int, flip: bool, mean, std) -> Tensor:
    """uint8 (C, S, S) -> float64 (C, h, w): mirror the whole crop, cut the window, normalize."""
    channels, _, width = crop.shape
    out = torch.empty(channels, *size, dtype=torch.float64)
    for c in range(channels):
        for x in range(size[1]):
            source = left + x
            if flip:
                source = width - 1 - source
            out[c, :, x] = (crop[c, top : top + size[0], source].double() / 255 - mean[c]) / std[c]
    return out


def patch_rows(image: Tensor, patch: int) -> Tensor:
    """(C, h, w) -> (L, patch * patch * C): patches in raster order, values by row, column, channel."""
    rows = []
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            rows.append(torch.cat([image[:, top + y, left + x] for y in range(patch) for x in range(patch)]))
    return torch.stack(rows)


def pixel_loss(
    preds: list[Tensor], views: list[Tensor], masked: list[list[int]], patch: int, normalize: bool
) -> Tensor:
    """sum(l * mask) / sum(mask) over the batch, l = mean squared error of a patch. preds: (L, V) per image."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for pred, view, ids in zip(preds, views, masked, strict=True):
        target = patch_rows(view, patch)
        values = target.shape[1]
        for patch_id in ids:
            t = target[patch_id]
            if normalize:
                mean = t.sum() / values
                variance = ((t - mean) ** 2).sum() / (values - 1)
                t = (t - mean) / math.sqrt(variance + 1e-6)
            total = total + ((pred[patch_id] - t) ** 2).sum() / values
            count += 1
    return total / count


# ---------------------------------------------------------------- transformer


def position_table(width: int, grid: tuple[int, int], first: str) -> Tensor:
    """(1 + L, width) by the formula, entry by entry; the class token's row is 0."""
    quarter = width // 4
    table = torch.zeros(1 + grid[0] * grid[1], width, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            halves = (column, row) if first == "column" else (row, column)
            for half, coordinate in enumerate(halves):
                for i in range(quarter):
                    angle = coordinate / 10000 ** (i / quarter)
                    table[1 + row * grid[1] + column, half * 2 * quarter + i] = math.sin(angle)
                    table[1 + row * grid[1] + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / torch.sqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: (N, d) each."""
    weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
    return (weights / weights.sum(1, keepdim=True)) @ v


def block(w: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """Pre-norm block on the tokens (N, D) of one image; the fused projection holds q, k, v one after the other."""
    width = x.shape[1]
    d = width // heads
    qkv = linear(w, "attn.qkv", layer_norm(w, "norm1", x))
    outputs = []
    for h in range(heads):
        q, k, v = (qkv[:, third * width + h * d : third * width + (h + 1) * d] for third in range(3))
        outputs.append(softmax_attention(q, k, v))
    x = x + linear(w, "attn.proj", torch.cat(outputs, 1))
    hidden = linear(w, "fc1", layer_norm(w, "norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(w, "fc2", hidden)


def count_blocks(w: dict[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))


def encode(w, view: Tensor, visible: list[int], *, patch: int, heads: int, first: str, final_norm: bool) -> Tensor:
    """(1 + K, D) of one image: a convolution over the whole view, then only the visible patches go on."""
    channels, height, width = view.shape
    flat = w["patch_embed.weight"]
    # Our rows are (row, column, channel); the published convolution is (D, channel, row, column).
    kernel = flat.reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
    maps = F.conv2d(view[None], kernel, w["patch_embed.bias"], stride=patch)[0]
    table = position_table(flat.shape[0], (height // patch, width // patch), first)
    columns = width // patch
    tokens = [w["cls_token"][0, 0] + table[0]]
    tokens += [maps[:, i // columns, i % columns] + table[1 + i] for i in visible]
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, heads)
    return layer_norm(w, "norm", x) if final_norm else x


def decode(w, latent: Tensor, visible: list[int], *, grid: tuple[int, int], heads: int, first: str) -> Tensor:
    """(L, values) of one image, for every patch, visible or not."""
    embedded = linear(w, "embed", latent)
    table = position_table(embedded.shape[1], grid, first)
    tokens = [embedded[0] + table[0]]
    for patch_id in range(grid[0] * grid[1]):
        known = patch_id in visible
        token = embedded[1 + visible.index(patch_id)] if known else w["mask_token"][0, 0]
        tokens.append(token + table[1 + patch_id])
    x = torch.stack(tokens)
    for i in range(count_blocks(w)):
        x = block(under(w, f"blocks.{i}"), x, heads)
    return linear(w, "pred", layer_norm(w, "norm", x))[1:]


# ---------------------------------------------------------------- contrast


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    columns = []
    for c in range(x.shape[1]):
        mean = x[:, c].sum() / len(x)
        variance = ((x[:, c] - mean) ** 2).sum() / len(x)
        columns.append((x[:, c] - mean) / torch.sqrt(variance + eps) * weight[c] + bias[c])
    return torch.stack(columns, 1)


def head(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Linear with bias, batch norm over all rows, ReLU, linear without bias."""
    x = x @ w["0.weight"].T + w["0.bias"]
    x = batch_norm(x, w["1.weight"], w["1.bias"])
    return torch.where(x > 0, x, torch.zeros_like(x)) @ w["3.weight"].T


def info_nce(queries: Tensor, keys: Tensor, labels: list[int], temperature: float) -> Tensor:
    """Mean cross entropy of the cosines divided by the temperature; keys: (N, D) of all ranks."""
    unit = [k / torch.sqrt((k * k).sum()) for k in keys]
    losses = []
    for query, label in zip(queries, labels, strict=True):
        q = query / torch.sqrt((query * query).sum())
        scores = [(q * k).sum() / temperature for k in unit]
        losses.append(torch.log(sum(torch.exp(s) for s in scores)) - scores[label])
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- the methods


def mae_loss(method, weights, batch, rng, *, normalize: bool, kept: int, heads: int, decoder_heads: int) -> Tensor:
    m = method.model
    flips = draw_flips(rng, batch.ids)
    visible = draw_visible(rng, batch.ids, m.num_patches, kept)
    views = [cut_view(c, m.image_size, 0, 0, f, m.mean, m.std) for c, f in zip(batch.crops[0], flips, strict=True)]
    preds = []
    for view, ids in zip(views, visible, strict=True):
        latent = encode(
            under(weights, "encoder"), view, ids, patch=m.patch_size, heads=heads, first="column", final_norm=True
        )
        decoder = under(weights, "decoder")
        preds.append(decode(decoder, latent, ids, grid=m.grid, heads=decoder_heads, first="column"))
    masked = [[i for i in range(m.num_patches) if i not in ids] for ids in visible]
    return pixel_loss(preds, views, masked, m.patch_size, normalize)


def cmae_vectors(
    method, weights, batch, rng, *, cell: int, kept_cells: int, heads: int, decoder_heads: int, target_views=None
) -> tuple[Tensor, Tensor, Tensor]:
    """(pixel loss, queries, keys); the target views are exact crops unless given."""
    m = method.model
    flips = draw_flips(rng, batch.ids)
    cells = draw_visible(rng, batch.ids, m.num_patches // cell**2, kept_cells)
    visible = [cells_to_patches(c, m.grid, cell) for c in cells]
    crops = batch.crops[0]
    views = [cut_view(c, m.image_size, 0, 0, f, m.mean, m.std) for c, f in zip(crops, flips, strict=True)]
    if target_views is None:
        shifts = draw_shifts(rng, batch.ids, 2 * m.patch_size - 1)
        target_views = [
            cut_view(c, m.image_size, top, left, f, m.mean, m.std)
            for c, f, (top, left) in zip(crops, flips, shifts, strict=True)
        ]
    preds, pooled, targets = [], [], []
    for view, target_view, ids in zip(views, target_views, visible, strict=True):
        sizes = dict(patch=m.patch_size, heads=heads, first="row")
        latent = encode(under(weights, "encoder"), view, ids, final_norm=True, **sizes)
        light = dict(grid=m.grid, heads=decoder_heads, first="row")
        preds.append(decode(under(weights, "pixel_decoder"), latent, ids, **light))
        features = decode(under(weights, "feature_decoder"), latent, ids, **light)
        pooled.append(features.sum(0) / m.num_patches)
        everything = list(range(m.num_patches))
        tokens = encode(under(weights, "target_encoder"), target_view, everything, final_norm=False, **sizes)
        targets.append(tokens[1:].sum(0) / m.num_patches)
    masked = [[i for i in range(m.num_patches) if i not in ids] for ids in visible]
    pixel = pixel_loss(preds, views, masked, m.patch_size, normalize=True)
    queries = head(under(weights, "predictor"), head(under(weights, "projector"), torch.stack(pooled)))
    keys = head(under(weights, "target_projector"), torch.stack(targets)).detach()
    return pixel, queries, keys


def assert_same_gradients(module: nn.Module, weights: dict[str, Tensor], rtol: float = 1e-3) -> None:
    """Gradient of every parameter against the slow one: error of the whole tensor within rtol of its norm.

    Gradients that are 0 by construction (of a bias before batch norm, say) may be off by 1e-6 of the largest one.
    """
    norms = {n: 0.0 if w.grad is None else float(w.grad.norm()) for n, w in weights.items()}
    floor = 1e-6 * max(norms.values())
    for name, parameter in module.named_parameters():
        slow = weights[name].grad
        if not parameter.requires_grad or slow is None:
            assert parameter.grad is None or not parameter.grad.any(), f"{name}: expected no gradient"
            continue
        error = float((parameter.grad.double() - slow).norm())
        assert error <= rtol * norms[name] + floor, f"{name}: gradient off by {error}, norm {norms[name]}"


# ---------------------------------------------------------------- two real processes


def small_cmae(seed=0):
    """A CMAE of few parameters, scrambled; the same in every process."""
    from fastmim.methods import cmae

    torch.manual_seed(seed)
    config = cmae.Config(
        mask_ratio=0.5, pixel_decoder_depth=1, feature_decoder_depth=1, decoder_width=32, decoder_heads=4,
        head_hidden=40, head_out=16,
    )  # fmt: skip
    method = cmae.CMAE(model_spec(), config)
    scramble(method, seed)
    return method


def head_case() -> tuple[nn.Module, Tensor, Tensor]:
    """(head, input (8, 12), weights of the loss (8, 5)) in float32."""
    from fastmim.heads import ProjectionHead

    torch.manual_seed(5)
    module = ProjectionHead(12, 20, 5)
    scramble(module, 5)
    return module, torch.randn(8, 12), torch.randn(8, 5)


def _on_rank(rank: int, folder: str) -> None:
    """One of two gloo processes: half of each batch, results to a file."""
    import torch.distributed as dist
    from fastmim_pipelines.spec import Batch

    from fastmim.config import SIZES, Size

    torch.set_num_threads(1)
    SIZES["vit_tiny"] = Size(*SMALL)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    half = slice(4 * rank, 4 * rank + 4)
    module, x, weight = head_case()
    x.requires_grad_()
    out = module(x[half])
    (out * weight[half]).sum().backward()
    result = {"head": out.detach(), "head_input_grad": x.grad[half].clone()}
    result |= {f"head_grad.{n}": p.grad for n, p in module.named_parameters()}

    method = small_cmae()
    whole = make_batch(method, 8)
    output = method(Batch((whole.crops[0][half],), whole.ids[half]), make_rng())
    output.loss.backward()
    result |= {f"part.{n}": v for n, v in output.parts.items()}
    result |= {f"grad.{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def two_rank_results() -> list[dict[str, Tensor]]:
    """What `_on_rank` found on ranks 0 and 1; the processes run once per test session."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (folder,), nprocs=2)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
