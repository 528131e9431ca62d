"""CAE against a slow re-computation from specs/cae.md: both targets, every branch, initial weights, presets."""

import dataclasses
import math

import fastmim_kernels as fk
import pytest
import torch
from fastmim_pipelines.spec import Batch, CropSpec
from slow_reference import (
    SMALL,
    assert_same_gradients,
    cut_view,
    doubles,
    draw_flips,
    layer_norm,
    linear,
    make_rng,
    model_spec,
    patch_rows,
    position_table,
    scramble,
    softmax_attention,
    under,
)
from torch import nn
from torch.nn import functional as F

from fastmim.config import SIZES, ConfigError, Size, TrainConfig
from fastmim.methods import base, cae
from fastmim.optim import adamw
from fastmim.tokenizer import DalleEncoder, RecordedTarget, record_tokens

# (height, width, patch, channels)
SHAPES = [(16, 24, 4, 3), (24, 16, 4, 1), (8, 12, 2, 5)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
WIDTH, DEPTH, HEADS = SMALL


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(*SMALL))


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


# ---- the method once more, slowly


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


def slow_terms(method, weights, batch, rng, *, min_block, masked, depths=(2, 1), peak=0.4, cut=True, tokens=None):
    """(decoder's loss, alignment, accuracy) in float64, image by image.

    Args:
        cut: the alignment target is a constant.
        tokens: (B, L) token ids; None: the target is pixels.
    """
    m = method.model
    flips = draw_flips(rng, batch.ids)
    drops = slow_drops(rng, batch.ids, peak, DEPTH, DEPTH, *depths)
    plan = fk.block_masking(rng, batch.ids, m.grid, masked, min_block=min_block)
    count, heads = len(batch.ids), HEADS
    decoded, align, right = 0.0, 0.0, 0
    for b in range(count):
        view = cut_view(batch.crops[0][b], m.image_size, 0, 0, flips[b], m.mean, m.std)
        hidden = [i for i in range(m.num_patches) if plan.mask[b, i]]
        seen = [i for i in range(m.num_patches) if not plan.mask[b, i]]
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
        x = predicted + table[hidden]
        for i, drop in enumerate(drops[b][3]):
            x = slow_block(under(weights, f"decoder.blocks.{i}"), x, heads, drop)
        out = linear(weights, "decoder.head", layer_norm(weights, "decoder.norm", x))
        if tokens is None:
            rows = patch_rows(view, m.patch_size)[hidden]
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


# ---- the whole method

# 24 patches: 12 masked, blocks from round(16 / 196 * 24) = 2.
CASE = dict(min_block=2, masked=12)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_cae_losses_and_gradients_equal_the_slow_recomputation(small, shape, target):
    tokenizer = Brightness() if target == "tokens" else None
    method = build(shape, tokenizer=tokenizer)
    batch, rng = make_batch(method), make_rng()
    assert set(draw_flips(rng, batch.ids)) == {True, False}, "the case must hold flipped and plain images"
    output = method(batch, rng)
    weights = doubles(method)
    tokens = None if tokenizer is None else tokens_of(tokenizer, batch, rng)
    decoded, align, accuracy = slow_terms(method, weights, batch, rng, tokens=tokens, **CASE)
    name = "pixel" if tokenizer is None else "token"
    assert set(output.parts) == {name, "align"}
    assert output.parts[name].item() == pytest.approx(decoded.item(), rel=1e-5)
    assert output.parts["align"].item() == pytest.approx(align.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((decoded + align).item(), rel=1e-5)
    if tokenizer is not None:
        assert output.measures["mlm_acc"].item() == pytest.approx(accuracy, rel=1e-6)
        assert len(set(tokens.flatten().tolist())) > 5
    assert not any(t.requires_grad for t in [*output.parts.values(), *output.measures.values()])
    output.loss.backward()
    (decoded + align).backward()
    assert_same_gradients(method, weights)


def test_cae_with_another_decoder_width_projects_both_branches(small):
    method = build(decoder_width=36, decoder_heads=HEADS, regressor_depth=1, decoder_depth=2)
    assert method.decoder.head.in_features == 36 and method.regressor.mask_token.shape == (1, 1, 36)
    batch, rng = make_batch(method), make_rng()
    output, weights = method(batch, rng), doubles(method)
    decoded, align, _ = slow_terms(method, weights, batch, rng, depths=(1, 2), **CASE)
    assert output.parts["pixel"].item() == pytest.approx(decoded.item(), rel=1e-5)
    assert output.parts["align"].item() == pytest.approx(align.item(), rel=1e-5)
    output.loss.backward()
    (decoded + align).backward()
    assert_same_gradients(method, weights)


def test_cae_without_stochastic_depth_equals_the_slow_recomputation(small):
    method = build(drop_path=0.0)
    batch, rng = make_batch(method), make_rng()
    decoded, align, _ = slow_terms(method, doubles(method), batch, rng, peak=0.0, **CASE)
    assert method(batch, rng).loss.item() == pytest.approx((decoded + align).item(), rel=1e-5)


def test_cae_weighs_the_alignment(small):
    batch, rng = make_batch(build()), make_rng()
    two, five = build()(batch, rng), build(align_weight=5.0)(batch, rng)
    assert five.parts["align"].item() == pytest.approx(2.5 * two.parts["align"].item(), rel=1e-6)
    assert five.loss.item() == pytest.approx(sum(v.item() for v in five.parts.values()), rel=1e-6)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_in_bf16_is_near_float32_and_every_parameter_learns(small, target):
    """Autocast keeps the copies of weights that it makes: the pass without gradient must not make the first ones."""
    results = {}
    for precision in ("fp32", "bf16"):
        method = build(tokenizer=Brightness() if target == "tokens" else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = method(make_batch(method), make_rng())
        output.loss.backward()
        assert output.loss.dtype == torch.float32
        results[precision] = output.loss.item(), {n: p.grad for n, p in method.named_parameters()}
    assert results["bf16"][0] == pytest.approx(results["fp32"][0], rel=2e-2)
    largest = max(g.norm() for g in results["fp32"][1].values())
    for name, exact in results["fp32"][1].items():
        low = results["bf16"][1][name]
        assert low is not None and low.any(), name
        assert (low - exact).norm() < 0.1 * exact.norm() + 1e-3 * largest, name


# ---- the alignment branch


def test_cae_target_branch_gets_no_gradient(small):
    """Exactly the gradients of a constant target; those of a trained target are others."""
    method = build()
    batch, rng = make_batch(method), make_rng()
    drops = cae.random_drop_path(rng, batch.ids, 0.4, *method.depths)
    target = method._encode_masked(batch.crops[0], method.mask(rng, batch.ids), drops[1])
    assert not target.requires_grad and target.grad_fn is None
    method(batch, rng).loss.backward()
    grads = {}
    for cut in (True, False):
        weights = doubles(method)
        decoded, align, _ = slow_terms(method, weights, batch, rng, cut=cut, **CASE)
        (decoded + align).backward()
        grads[cut] = weights["encoder.blocks.0.fc1.weight"].grad
    ours = method.encoder.blocks[0].fc1.weight.grad.double()
    assert (ours - grads[True]).norm() < 1e-4 * grads[True].norm()
    assert (ours - grads[False]).norm() > 1e-2 * grads[False].norm(), "the case can tell"


def test_cae_target_is_the_same_encoder_without_lag_on_masked_patches_only(small, monkeypatch):
    """One set of weights; the second call sees class token and masked patches, with drop path draws of its own."""
    calls = []
    method = build()
    real = method.encoder.forward

    def spy(patches, ids, drop):
        calls.append((patches, ids, drop, torch.is_grad_enabled()))
        return real(patches, ids, drop=drop)

    monkeypatch.setattr(method.encoder, "forward", spy)
    batch, rng = make_batch(method), make_rng()
    method(batch, rng)
    (_, keep, drop_keep, grad_keep), (_, masked, drop_masked, grad_masked) = calls
    plan = method.mask(rng, batch.ids)
    assert torch.equal(keep, plan.ids_keep) and torch.equal(masked, plan.ids_masked)
    assert grad_keep and not grad_masked
    assert drop_keep.shape == drop_masked.shape == (4, DEPTH, 2) and not torch.equal(drop_keep, drop_masked)
    assert [n for n, _ in method.named_children()] == ["encoder", "bridge", "regressor", "decoder"]
    assert method.ema_pairs() == []


def test_cae_alignment_of_equal_latents_is_0(small):
    method = build()
    latent = torch.randn(4, 12, WIDTH)
    method._predict = lambda *args, **kwargs: latent
    method._encode_masked = lambda *args, **kwargs: latent
    assert method(make_batch(method), make_rng()).parts["align"].item() == 0


def test_cae_visible_latents_are_regressed_without_the_class_token(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    given = []
    method.regressor.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    method(batch, rng)
    assert given[0].shape == (4, 12, WIDTH)
    method.zero_grad()
    method(batch, rng).loss.backward()
    assert method.encoder.cls_token.grad.abs().sum() > 0, "it learns through attention"


# ---- the regressor


@pytest.mark.parametrize("depth", [1, 4])
def test_cae_regressor_equals_the_naive_formula(small, depth):
    torch.manual_seed(1)
    model = model_spec(20, 28, 4)
    regressor = cae.Regressor(model, 24, 4, depth, 0.1)
    cae.initialize(regressor)
    scramble(regressor, 2, 0.3)
    plan = fk.block_masking(make_rng(), torch.arange(3), model.grid, 17, min_block=3)
    visible = torch.randn(3, 18, 24)
    drop = torch.rand(3, depth, 2) * 2
    got = regressor(visible, plan, drop)
    table = position_table(24, model.grid, "row")[1:]
    for b in range(3):
        arguments = (doubles(regressor), visible[b].double(), table[plan.ids_keep[b]], table[plan.ids_masked[b]], 4)
        slow = slow_regress(*arguments, drop[b].tolist())
        torch.testing.assert_close(got[b].double(), slow, rtol=1e-5, atol=1e-5)


QUIRKS = [
    "values have positions", "residual has positions", "MLP residual is not normalized",
    "queries do not see each other", "no last norm",
]  # fmt: skip


@pytest.mark.parametrize("quirk", QUIRKS)
def test_cae_regressor_has_the_source_s_quirks(small, quirk):
    """Each expectable variant differs by far more than rounding, so the test above tells them apart."""
    torch.manual_seed(1)
    model = model_spec(20, 28, 4)
    regressor = cae.Regressor(model, 24, 4, 2, 0.5)
    cae.initialize(regressor)
    scramble(regressor, 2, 0.3)
    plan = fk.block_masking(make_rng(), torch.arange(1), model.grid, 17, min_block=3)
    visible = torch.randn(1, 18, 24)
    table = position_table(24, model.grid, "row")[1:]
    arguments = (doubles(regressor), visible[0].double(), table[plan.ids_keep[0]], table[plan.ids_masked[0]], 4)
    other = slow_regress(*arguments, [(1.0, 1.0)] * 2, quirk=quirk)
    assert (regressor(visible, plan)[0] - other).abs().max() > 0.01


def test_cae_decoder_sees_the_masked_latents_only(small):
    """It gets (B, M, D) and the places of these; what it says of a patch depends on all of them."""
    method = build(drop_path=0.0)
    latent = torch.randn(2, 12, WIDTH, requires_grad=True)
    ids = torch.stack([torch.randperm(24)[:12] for _ in range(2)])
    out = method.decoder(latent, ids)
    assert out.shape == (2, 12, 48)
    (grad,) = torch.autograd.grad(out[0, 3].sum(), latent)
    assert grad[0].abs().sum(1).min() > 0 and not grad[1].any()
    order = torch.randperm(12)
    torch.testing.assert_close(method.decoder(latent[:, order], ids[:, order]), out[:, order])


# ---- masks and crops


def test_cae_masks_98_of_196_patches_in_blocks(small):
    method = build((224, 224, 16, 3))
    assert (method.mask.num_masked, method.mask.min_block) == (98, 16)
    ids, rng = torch.arange(600), make_rng()
    plan = method.mask(rng, ids)
    for a, b in zip(plan, fk.block_masking(rng, ids, (14, 14), 98), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plan.mask.sum(1), torch.full((600,), 98.0))
    assert torch.equal(plan.ids_masked, plan.ids_masked.sort(1).values)
    share = plan.mask.mean(0).view(14, 14)
    # Five standard errors of 600 masks, and the scatter of the published numbers.
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item() == pytest.approx(0.06, abs=0.03)
    assert share[6:8, 6:8].mean().item() == pytest.approx(0.86, abs=0.07)


@pytest.mark.parametrize(
    "shape, ratio, masked, min_block",
    [((224, 224, 16, 3), 0.38, 75, 16), ((48, 48, 12, 3), 0.5, 8, 1), ((64, 96, 16, 3), 0.5, 12, 2),
     ((40, 56, 8, 3), 0.5, 18, 3), ((256, 256, 16, 3), 0.5, 128, 21)],
)  # fmt: skip
def test_cae_blocks_scale_with_the_grid(small, shape, ratio, masked, min_block):
    method = build(shape, mask_ratio=ratio)
    assert (method.mask.num_masked, method.mask.min_block) == (masked, min_block)
    assert method.mask(make_rng(), torch.arange(3)).ids_masked.shape == (3, masked)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_cae_refuses_to_mask_nothing_or_everything(small, ratio):
    with pytest.raises(ConfigError, match="mask ratio"):
        build(mask_ratio=ratio)


def test_cae_asks_for_one_crop_with_pixels_and_two_of_one_box_with_tokens(small):
    plain = CropSpec(size=(224, 224), scale=(0.08, 1.0))
    assert build((224, 224, 16, 3)).crops == (plain,)
    network = DalleEncoder(3, 8, 1, 30)
    half = CropSpec(size=(112, 112), scale=(0.08, 1.0), filter="lanczos")
    assert build((224, 224, 16, 3), tokenizer=network).crops == (plain, half)
    assert plain.view == half.view and plain.ratio == half.ratio, "one box"
    # A token per patch on any grid: 8 pixels of the d-VAE for each.
    assert build((48, 72, 12, 3), tokenizer=network, crop_scale=(0.5, 1.0)).crops[1] == CropSpec(
        size=(32, 48), scale=(0.5, 1.0), filter="lanczos"
    )


def test_cae_tokenizes_the_mirrored_second_crop_at_the_masked_patches(small):
    tokenizer = Brightness()
    method = build(tokenizer=tokenizer)
    batch, rng = make_batch(method, 6), make_rng()
    method(batch, rng)
    ((images, ids),) = tokenizer.seen
    flips = draw_flips(rng, batch.ids)
    assert set(flips) == {True, False}
    for image, crop, flip in zip(images, batch.crops[1], flips, strict=True):
        exact = cut_view(crop, crop.shape[1:], 0, 0, flip, (0,) * 3, (1,) * 3)
        torch.testing.assert_close(image.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(ids, method.mask(rng, batch.ids).ids_masked)


# ---- tokens


def test_cae_cross_entropy_starts_at_the_log_of_8192(small):
    torch.manual_seed(0)
    method = cae.CAE(model_spec(), cae.Config(), Brightness(8192))
    token = method(make_batch(method, 8), make_rng()).parts["token"].item()
    assert token == pytest.approx(math.log(8192), abs=0.1) == pytest.approx(9.01, abs=0.1)


def test_cae_tokenizer_is_no_part_of_what_is_trained(small):
    tokenizer = DalleEncoder(3, 8, 1, 30)
    method = build(tokenizer=tokenizer)
    names = [n for n, _ in method.named_parameters()]
    assert not any("token" in n and not n.endswith(("cls_token", "mask_token")) for n in names)
    assert set(method.state_dict()) == set(names)
    before = {n: t.clone() for n, t in tokenizer.state_dict().items()}
    output = method(make_batch(method), make_rng())
    output.loss.backward()
    assert all(torch.equal(t, before[n]) for n, t in tokenizer.state_dict().items())
    assert not tokenizer.training


def test_cae_takes_the_published_file(small, tmp_path):
    network = DalleEncoder(3, 8, 1, 30)
    torch.save(network.state_dict(), tmp_path / "encoder.pkl")
    for path in (tmp_path / "encoder.pkl", str(tmp_path / "encoder.pkl")):  # a checkpoint's options hold text
        method, given = build(tokenizer=None, tokenizer_file=path), build(tokenizer=network)
        assert method.notes == () and method.decoder.head.out_features == 30
        batch, rng = make_batch(method), make_rng()
        assert torch.equal(method(batch, rng).loss, given(batch, rng).loss)


def test_cae_trains_on_recorded_tokens_without_tokenizer_and_second_crop(small, tmp_path):
    network = DalleEncoder(3, 8, 1, 30)
    torch.save(network.state_dict(), tmp_path / "encoder.pkl")
    live = build(tokenizer=network)
    batch, rng = make_batch(live), make_rng(step=11)

    class Loader:
        steps_per_epoch = 20

        def epoch(self, epoch, start_step=0):
            yield from [batch] * (20 - start_step)

    folder = tmp_path / "tokens"
    record_tokens(folder, Loader(), network, live.model, seed=3, steps=range(11, 13), device=torch.device("cpu"))
    for options in (dict(), dict(tokenizer_file=tmp_path / "encoder.pkl")):
        method = build(tokens=folder, **options)
        assert isinstance(method.tokens, RecordedTarget) and len(method.crops) == 1
        assert torch.equal(method(Batch(batch.crops[:1], batch.ids), rng).loss, live(batch, rng).loss)
    with pytest.raises(ConfigError, match="expected seed 4, got 3"):
        method(batch, make_rng(seed=4, step=11))


@pytest.mark.parametrize("target", ["auto", "pixel", "dvae"])
def test_cae_without_tokenizer_says_what_it_predicts_instead(small, target):
    if target == "dvae":
        with pytest.raises(ConfigError, match=r"--cae.target dvae: expected --cae.tokenizer .* got none"):
            build(target=target)
        return
    method = build(target=target)
    assert method.decoder.head.out_features == 48
    assert len(method.notes) == (target == "auto")
    if target == "auto":
        assert "predicts pixels" in method.notes[0] and "--cae.tokenizer" in method.notes[0]


def test_cae_refuses_a_tokenizer_of_other_channels_and_a_missing_one(small, tmp_path):
    torch.save(DalleEncoder(1, 8, 1, 30).state_dict(), tmp_path / "e.pkl")
    with pytest.raises(ConfigError, match=r"--in-chans: expected 1, which the tokenizer .* takes, got 3"):
        build(tokenizer_file=tmp_path / "e.pkl")
    with pytest.raises(ConfigError, match=r"tokenizer: expected the file .*, got none there; download https"):
        build(tokenizer_file=tmp_path / "none.pkl")
    assert build(tokenizer_file=tmp_path / "none.pkl", target="pixel").tokens is None


def test_cae_refuses_a_decoder_width_that_its_heads_do_not_divide(small):
    with pytest.raises(ConfigError, match="decoder_width: expected a multiple of 4 and of 3 heads, got 40"):
        build(decoder_width=40)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(regressor_depth=0), "expected at least 1 block, got 0 and 1"),
        (dict(decoder_depth=0), "expected at least 1 block, got 2 and 0"),
        (dict(drop_path=1.0), "drop_path: expected 0 <= rate < 1, got 1.0"),
        (dict(drop_path=-0.1), "drop_path"),
    ],
    ids=range(4),
)
def test_cae_refuses_options_out_of_range(small, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


# ---- side effects, repetition, micro-batches


def test_cae_forward_has_no_side_effects(small):
    method = build(tokenizer=DalleEncoder(3, 8, 1, 30))
    batch, rng = make_batch(method), make_rng()
    state = {n: t.clone() for n, t in [*method.named_parameters(), *method.named_buffers()]}
    crops, generator = [c.clone() for c in batch.crops], torch.get_rng_state()
    method(batch, rng).loss.backward()
    assert all(torch.equal(t, state[n]) for n, t in [*method.named_parameters(), *method.named_buffers()])
    assert all(torch.equal(a, b) for a, b in zip(crops, batch.crops, strict=True)) and torch.equal(rng, make_rng())
    assert torch.equal(torch.get_rng_state(), generator), "nothing random but what rng and ids give"


def test_cae_repeats_bit_for_bit_and_changes_with_step_seed_and_ids(small):
    method = build()
    batch, rng = make_batch(method), make_rng()
    loss = method(batch, rng).loss
    torch.manual_seed(99)
    assert torch.equal(method(batch, rng).loss, loss)
    for other, at in ((batch, make_rng(step=12)), (batch, make_rng(seed=4)), (Batch(batch.crops, batch.ids + 1), rng)):
        assert not torch.equal(method(other, at).loss, loss)


def test_cae_micro_batches_average_to_the_full_batch(small):
    method = build(tokenizer=Brightness())
    batch, rng = make_batch(method, 6), make_rng()
    full = method(batch, rng).loss
    full.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters()}
    method.zero_grad()
    losses = []
    for i in range(0, 6, 2):
        loss = method(Batch(tuple(c[i : i + 2] for c in batch.crops), batch.ids[i : i + 2]), rng).loss
        (loss / 3).backward()
        losses.append(loss.item())
    assert sum(losses) / 3 == pytest.approx(full.item(), rel=1e-6)
    for name, parameter in method.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_parameters_are_used_inside_their_modules_only(small, target):
    """As under ZeRO-3: a parameter holds its values only while the forward of the module that owns it runs."""
    method = build(tokenizer=Brightness() if target == "tokens" else None, decoder_width=36)
    batch, rng = make_batch(method), make_rng()
    with torch.no_grad():
        expected = method(batch, rng).loss
        values = {p: p.data for p in method.parameters()}

        def gather(module, *_):
            for p in module.parameters(recurse=False):
                p.data = values[p]

        def release(module, *_):
            for p in module.parameters(recurse=False):
                p.data = torch.empty(0)

        for module in method.modules():
            if module is not method:
                module.register_forward_pre_hook(gather)
                module.register_forward_hook(release)
            release(module)
        assert torch.equal(method(batch, rng).loss, expected)


@pytest.mark.parametrize("target", ["pixel", "tokens"])
def test_cae_learns_fixed_pictures(monkeypatch, target):
    """Waves of fixed masks: alignment and decoding both get better."""
    steps, peak = 120, 3e-3
    monkeypatch.setitem(SIZES, "vit_tiny", Size(64, 2, 4))
    torch.manual_seed(0)
    config = cae.Config(regressor_depth=2, decoder_depth=1, drop_path=0.0)
    method = cae.CAE(model_spec(16, 16, 4, 1), config, Brightness(8) if target == "tokens" else None)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    a, b, c = torch.rand(3, 16, 1, 1, 1)
    waves = (127 + 120 * torch.sin(0.5 * a * x + 0.5 * b * y + 6 * c)).to(torch.uint8)
    batch = Batch((waves, waves[:, :, :12, :12]), torch.arange(16))
    optimizer = torch.optim.AdamW(method.parameters(), lr=peak)
    outputs = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / 20) * (1 - step / steps)
        output = method(batch, make_rng(step=0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        outputs.append({name: value.item() for name, value in (output.parts | output.measures).items()})
    first, last = outputs[0], outputs[-1]
    assert last["align"] < 0.3 * first["align"]
    assert last["pixel" if target == "pixel" else "token"] < 0.5 * first["pixel" if target == "pixel" else "token"]
    if target == "tokens":
        assert last["mlm_acc"] > 0.6 > 0.4 > first["mlm_acc"]


# ---- pictures


def test_cae_pictures_show_view_mask_and_prediction(small):
    method = build()
    batch, rng = make_batch(method, 2), make_rng()
    plan = method.mask(rng, batch.ids)
    pictures = method.reconstruct(batch.crops[0], batch.ids, rng)
    m = method.model
    predicted = method.decoder(method._predict(batch.crops[0], plan), plan.ids_masked).detach()
    for i in range(2):
        view = cut_view(batch.crops[0][i], m.image_size, 0, 0, False, (0,) * 3, (1,) * 3)
        rows = patch_rows(cut_view(batch.crops[0][i], m.image_size, 0, 0, False, m.mean, m.std), 4)
        torch.testing.assert_close(pictures.view[i].double(), view, rtol=0, atol=1e-5)
        masked = plan.ids_masked[i].tolist()
        for patch_id in range(24):
            top, left = patch_id // 6 * 4, patch_id % 6 * 4
            at = (i, slice(None), slice(top, top + 4), slice(left, left + 4))
            if patch_id not in masked:
                for picture in (pictures.masked, pictures.output):
                    torch.testing.assert_close(picture[at].double(), view[at[1:]], rtol=0, atol=1e-5)
                continue
            assert (pictures.masked[at] == 0.5).all()
            values = predicted[i, masked.index(patch_id)].double()
            values = values * math.sqrt(rows[patch_id].var() + 1e-6) + rows[patch_id].mean()
            for place in range(16):
                for c in range(3):
                    expected = min(max(float(values[place * 3 + c] * m.std[c] + m.mean[c]), 0), 1)
                    got = pictures.output[i, c, top + place // 4, left + place % 4].item()
                    assert got == pytest.approx(expected, abs=1e-5)


def test_cae_has_no_pictures_of_tokens(small):
    method = build(tokenizer=Brightness())
    assert method.reconstruct(make_batch(method).crops[0], torch.arange(4), make_rng()) is None


# ---- sizes, initial weights, weight decay, presets


def meta(name="vit_base", **options):
    tokenizer = Brightness(8192)
    with torch.device("meta"):
        return cae.CAE(model_spec(224, 224, 16, 3, name), cae.Config(**options), tokenizer)


def test_cae_base_has_the_published_numbers_of_parameters():
    method = meta()
    sizes = {n: sum(p.numel() for p in part.parameters()) / 1e6 for n, part in method.named_children()}
    assert round(sizes["encoder"], 2) == 85.66
    assert round(sizes["regressor"], 2) == 28.37
    # Four blocks like the encoder's of 7.086 M, a norm, a head of 768 x 8192 + 8192.
    assert round(sizes["decoder"], 2) == 34.66
    assert sizes["bridge"] == 0
    assert round(sum(sizes.values()), 1) == 148.7
    assert {b.attn.heads for part in (method.encoder, method.regressor, method.decoder) for b in part.blocks} == {12}
    assert (len(method.encoder.blocks), len(method.regressor.blocks), len(method.decoder.blocks)) == (12, 4, 4)


@pytest.mark.parametrize("name, width, heads", [("vit_base", 768, 12), ("vit_large", 1024, 16)])
def test_cae_decoder_follows_the_encoder_s_width(name, width, heads):
    method = meta(name)
    assert method.decoder.head.in_features == width and isinstance(method.bridge, nn.Identity)
    assert {b.attn.heads for b in [*method.regressor.blocks, *method.decoder.blocks]} == {heads}


def test_cae_keys_have_no_bias(small):
    method = build()
    names = {n for n, _ in method.named_parameters()}
    assert {
        "encoder.blocks.0.attn.qkv.q_bias",
        "decoder.blocks.0.attn.qkv.v_bias",
        "regressor.blocks.0.attn.q.bias",
    } <= names
    assert not names & {"encoder.blocks.0.attn.qkv.bias", "regressor.blocks.0.attn.k.bias"}


def test_cae_positions_put_the_row_first(small):
    method = build()
    tables = {n: b for n, b in method.named_buffers() if n.endswith("position")}
    assert set(tables) == {"encoder.position", "regressor.position", "decoder.position"}
    for name, table in tables.items():
        expected = position_table(WIDTH, (4, 6), "row")
        torch.testing.assert_close(table.double(), expected[len(expected) - len(table) :], rtol=0, atol=1e-7)
        assert len(table) == (25 if name.startswith("encoder") else 24)


def fresh(monkeypatch, **options):
    monkeypatch.setitem(SIZES, "vit_tiny", Size(96, 3, 3))
    torch.manual_seed(0)
    config = cae.Config(decoder_width=64, decoder_heads=4, regressor_depth=2, decoder_depth=2, **options)
    return cae.CAE(model_spec(), config, Brightness(50))


def check_constants(method, layer_scale):
    for name, p in method.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "gamma" in name:
            assert (p == layer_scale).all(), name
        elif "norm" in name or name == "bridge.1.weight":
            assert (p == 1).all(), name
    tokens = torch.cat([method.encoder.cls_token.flatten(), method.regressor.mask_token.flatten()])
    for values in (tokens, method.encoder.patch_embed.weight):
        assert values.abs().max() <= 0.02, "cut at one deviation"
        # Of a normal cut at one deviation: 0.54 deviations.
        assert values.std().item() == pytest.approx(0.54 * 0.02, rel=0.15)


def test_cae_fresh_weights_are_xavier_s_but_for_the_patch_embedding(monkeypatch):
    method = fresh(monkeypatch)
    check_constants(method, 0.1)
    linears = [(n, p) for n, p in method.named_modules() if isinstance(p, nn.Linear) and n != "encoder.patch_embed"]
    assert len(linears) == 4 * 3 + 1 + 6 * 2 + 4 * 2 + 1
    for name, part in linears:
        bound = math.sqrt(6 / (part.in_features + part.out_features))
        assert 0.97 * bound < part.weight.abs().max() <= bound * (1 + 1e-6), name


def test_cae_beit_init_shrinks_the_last_layer_of_each_branch(monkeypatch):
    method = fresh(monkeypatch, init="beit", layer_scale=1e-5)
    with torch.no_grad():
        method.bridge[0].bias.zero_()  # torch's own, as in the source
    check_constants(method, 1e-5)
    for network in (method.encoder, method.regressor, method.decoder):
        for n, block in enumerate(network.blocks, start=1):
            for part in (block.attn.proj, block.fc2):
                largest = 0.02 / math.sqrt(2 * n)
                assert 0.98 * largest < part.weight.abs().max() <= largest * (1 + 1e-6)
            assert 0.0198 < block.fc1.weight.abs().max() <= 0.02
    assert 0.0198 < method.decoder.head.weight.abs().max() <= 0.02


@pytest.mark.parametrize("name, scale, is_xavier", [("vit_base", 0.1, True), ("vit_large", 1e-5, False)])
def test_cae_large_models_start_as_meant(monkeypatch, name, scale, is_xavier):
    monkeypatch.setitem(SIZES, name, Size(32, 2, 2))
    method = cae.CAE(model_spec(name=name), cae.Config())
    assert torch.equal(method.encoder.blocks[0].gamma_1, torch.full((32,), scale))
    assert (method.encoder.blocks[0].fc1.weight.abs().max() > 0.05) == is_xavier


def test_cae_without_layer_scale_has_no_factors(small):
    method = build(layer_scale=0.0)
    assert not any("gamma" in n for n, _ in method.named_parameters())
    assert method(make_batch(method), make_rng()).loss.isfinite()


def test_cae_decays_its_tokens_and_spares_vectors(small):
    method = build()
    decayed, spared = adamw(method, method.no_decay, lr=1.0, weight_decay=0.05, betas=(0.9, 0.999)).param_groups
    names = {p: n for n, p in method.named_parameters()}
    decayed, spared = ({names[p] for p in group["params"]} for group in (decayed, spared))
    assert {"encoder.cls_token", "regressor.mask_token", "encoder.patch_embed.weight"} <= decayed
    assert spared == {n for n, p in method.named_parameters() if p.ndim == 1}
    assert {"encoder.blocks.0.gamma_1", "encoder.blocks.0.attn.qkv.q_bias", "decoder.norm.weight"} <= spared


def test_cae_export_is_the_encoder_alone(small):
    method = build(tokenizer=Brightness())
    assert set(method.export()) == {n for n, _ in method.encoder.named_parameters()}
    rebuilt = method.encoder_class(method.model)(method.model, **method.encoder.design)
    rebuilt.load_state_dict(method.export())
    images = make_batch(method).crops[0]
    assert torch.equal(rebuilt.features(images), method.encoder.features(images))


def test_cae_is_found_by_its_name():
    assert base.find("cae").METHOD is cae.CAE and set(cae.PRESETS) >= {"demo", "paper"}


def test_cae_paper_preset_is_the_published_recipe():
    preset = cae.PRESETS["paper"]
    config = dataclasses.replace(TrainConfig(method="cae"), **preset.train)
    expected = dict(
        model="vit_base", image_size=224, patch_size=16, batch_size=2048, epochs=300.0, betas=(0.9, 0.999),
        weight_decay=0.05, warmup="10ep", warmup_start=0.0, clip=3.0, lr=None,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.peak_lr == pytest.approx(1.5e-3, rel=1e-12)
    assert config.peak_lr * config.lr_end == pytest.approx(1e-5, rel=1e-12)
    options = dict(
        target="auto", tokenizer=None, tokens=None, mask_ratio=0.5, crop_scale=(0.08, 1.0), regressor_depth=4,
        decoder_depth=4, decoder_width=None, decoder_heads=None, layer_scale=None, drop_path=0.1, align_weight=2.0,
        init="auto",
    )  # fmt: skip
    assert dataclasses.asdict(preset.options) == options
    assert preset.models["vit_large"] == dict(epochs=1600.0, warmup="40ep")


def test_cae_demo_preset_builds_and_runs():
    preset = cae.PRESETS["demo"]
    config = dataclasses.replace(TrainConfig(method="cae"), **preset.train)
    method = base.build("cae", config.model_spec(), preset.options, 0)
    assert method.model.grid == (6, 6) and method.mask.num_masked == 18
    assert method(make_batch(method, 4), make_rng()).loss.isfinite()
