"""Top-K attention against a row-by-row recomputation, forward and backward; ties, prefix tokens, counts."""

import math

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import dispatch
from torch.nn import functional as F


def qkv_of(batch, heads, length, width, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, width, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def kept_keys(scores, topk, num_prefix):
    """Of one row of scores: the prefix keys and the best `topk` of the others, with all that tie with the last."""
    patches = range(num_prefix, len(scores))
    least = sorted((scores[j] for j in patches), reverse=True)[topk - 1]
    return [*range(num_prefix), *(j for j in patches if scores[j] >= least)]


def slow_attention(q, k, v, topk, num_prefix=1, scale=None):
    """Float64, one query at a time; a dropped key takes no part at all."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            rows = []
            scores = q[b, h] @ k[b, h].T * scale
            for i, row in enumerate(scores):
                keys = list(range(len(row))) if i < num_prefix else kept_keys(row.tolist(), topk, num_prefix)
                weights = torch.exp(row[keys] - row[keys].max())
                rows.append((weights / weights.sum()) @ v[b, h, keys])
            out[b, h] = torch.stack(rows)
    return out


def both_ways(function, tensors, weights):
    """Result and gradients of its weighted sum."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_close_to_slow(dtype, atol, topk, num_prefix, patches=196, heads=2, width=16, **named):
    tensors = qkv_of(1, heads, num_prefix + patches, width, dtype)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = both_ways(lambda *t: fk.topk_attention(*t, topk, num_prefix=num_prefix, **named), tensors, weights)
    exact = [t.detach().double() for t in tensors]
    truth = both_ways(lambda *t: slow_attention(*t, topk, num_prefix, **named), exact, weights.double())
    for g, t in zip(got, truth, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), t, rtol=atol, atol=atol)


@pytest.mark.parametrize("topk", [1, 24, 49, 98, 196])
def test_topk_attention_and_gradients_equal_the_slow_recomputation(topk):
    assert_close_to_slow(torch.float32, 1e-5, topk, 1)


@pytest.mark.parametrize("topk", [1, 24, 49, 98, 196])
def test_topk_attention_in_bfloat16_is_within_2_percent(topk):
    assert_close_to_slow(torch.bfloat16, 2e-2, topk, 1, heads=1)


@pytest.mark.parametrize(
    ("patches", "topk", "num_prefix", "width", "scale"), [(49, 12, 0, 5, None), (17, 6, 3, 33, 0.4), (1, 1, 1, 8, None)]
)
def test_topk_attention_of_odd_sizes(patches, topk, num_prefix, width, scale):
    assert_close_to_slow(torch.float32, 1e-5, topk, num_prefix, patches=patches, heads=3, width=width, scale=scale)


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_all_keys_kept_is_plain_attention(num_prefix):
    tensors = qkv_of(2, 3, 50, 20)
    weights = torch.randn(tensors[0].shape)
    got = both_ways(lambda *t: fk.topk_attention(*t, 50 - num_prefix, num_prefix=num_prefix), tensors, weights)
    for g, t in zip(got, both_ways(F.scaled_dot_product_attention, tensors, weights), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-5, atol=1e-5)


def test_gradients_by_finite_differences():
    q, k, v = (t.detach().double().requires_grad_() for t in qkv_of(1, 2, 6, 3))
    assert torch.autograd.gradcheck(lambda *t: fk.topk_attention(*t, 2), (q, k, v))


def test_dropped_keys_change_nothing_and_get_no_gradient():
    q, k, v = qkv_of(1, 1, 9, 4)
    scores = (q @ k.transpose(-2, -1))[0, 0, 5].tolist()
    kept = kept_keys(scores, 3, 1)
    dropped = [j for j in range(9) if j not in kept]
    out = fk.topk_attention(q, k, v, 3)[0, 0, 5]
    gq, gk, gv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not gk[0, 0, dropped].any() and not gv[0, 0, dropped].any()
    assert gk[0, 0, kept].any(1).all() and gv[0, 0, kept].any(1).all() and gq[0, 0, 5].any()
    other = v.detach().clone()
    other[0, 0, dropped] = 1e6
    assert torch.equal(fk.topk_attention(q, k, other, 3)[0, 0, 5], out)


def test_ties_with_the_last_kept_key_all_stay():
    """Scores 2, 1, 1, 1, 0 of each patch query: K = 2 keeps the three tied ones, too."""
    q = torch.ones(1, 1, 5, 1)
    k = torch.tensor([2.0, 1, 1, 1, 0]).view(1, 1, 5, 1)
    v = torch.eye(5).view(1, 1, 5, 5)[..., :1].contiguous()
    labels = torch.zeros(1, 5, dtype=torch.int64)
    out, hits = fk.topk_attention(q, k, v, 2, num_prefix=0, labels=labels)
    assert hits.tolist() == [[[4] * 5]]
    expected = math.exp(2) / (math.exp(2) + 3 * math.exp(1))
    assert out[0, 0, 0].item() == pytest.approx(expected, rel=1e-6)
    same = torch.ones_like(k)
    assert torch.equal(fk.topk_attention(q, same, v, 1, num_prefix=0), F.scaled_dot_product_attention(q, same, v))


@pytest.mark.parametrize("num_prefix", [1, 3])
def test_prefix_keys_stay_and_prefix_queries_see_all(num_prefix):
    """Prefix keys with the lowest of all scores keep their weight and take no place of a patch."""
    q, k, v = (t.detach().abs() for t in qkv_of(1, 2, 12, 4))
    k[:, :, :num_prefix] *= -1
    got = fk.topk_attention(q, k, v, 2, num_prefix=num_prefix)
    slow = slow_attention(q.double(), k.double(), v.double(), 2, num_prefix)
    torch.testing.assert_close(got.double(), slow, rtol=1e-5, atol=1e-6)
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(got[:, :, :num_prefix], plain[:, :, :num_prefix])
    v[:, :, :num_prefix] += 1
    assert (fk.topk_attention(q, k, v, 2, num_prefix=num_prefix) > got).all()


@pytest.mark.parametrize(("patches", "topk", "num_prefix"), [(49, 12, 1), (16, 5, 0), (7, 7, 2)])
def test_counts_are_of_the_kept_keys_with_the_query_s_label(patches, topk, num_prefix):
    q, k, v = (t.detach() for t in qkv_of(2, 3, num_prefix + patches, 8))
    labels = torch.randint(0, 3, (2, patches), generator=torch.Generator().manual_seed(1))
    out, hits = fk.topk_attention(q, k, v, topk, num_prefix=num_prefix, labels=labels)
    assert torch.equal(out, fk.topk_attention(q, k, v, topk, num_prefix=num_prefix))
    assert hits.shape == (2, 3, patches) and hits.dtype == torch.int64
    scores = q.double() @ k.double().transpose(-2, -1)
    for b in range(2):
        for h in range(3):
            for i in range(patches):
                keys = kept_keys(scores[b, h, num_prefix + i].tolist(), topk, num_prefix)[num_prefix:]
                assert len(keys) == topk
                assert hits[b, h, i] == sum(labels[b, j - num_prefix] == labels[b, i] for j in keys)


@pytest.mark.parametrize(("members", "topk"), [(4, 49), (2, 98)])
def test_accuracy_of_unrelated_queries_and_keys_is_the_share_of_an_image(members, topk):
    q, k, v = (t.detach() for t in qkv_of(4, 6, 197, 16))
    src = fk.partition(torch.tensor([1, 2]), torch.arange(4), 196, members)
    _, hits = fk.topk_attention(q, k, v, topk, labels=src)
    assert float(hits.float().mean() / topk) == pytest.approx(1 / members, abs=0.01)


def test_queries_that_single_out_their_image_reach_full_accuracy():
    src = fk.partition(torch.tensor([1, 2]), torch.arange(2), 196, 4)
    codes = torch.cat([torch.zeros(2, 1, 4), F.one_hot(src, 4).float()], 1)[:, None]
    _, hits = fk.topk_attention(codes, codes, codes, 49, labels=src)
    assert (hits == 49).all()


def test_autocast_does_not_touch_the_selection_in_float32():
    q, k, v = (t.detach() for t in qkv_of(2, 2, 50, 16))
    with torch.autocast("cpu", torch.bfloat16):
        inside = fk.topk_attention(q, k, v, 12)
    assert inside.dtype == torch.float32 and torch.equal(inside, fk.topk_attention(q, k, v, 12))


def test_scores_of_bfloat16_inputs_are_not_rounded():
    """196 scores rounded to 8 bits tie often; exact ones never do here, so exactly K keys stay."""
    q, k, v = (t.detach() for t in qkv_of(1, 4, 197, 64, torch.bfloat16))
    _, hits = fk.topk_attention(q, k, v, 49, labels=torch.zeros(1, 196, dtype=torch.int64))
    assert (hits == 49).all()
    rounded = (q @ k.transpose(-2, -1))[:, :, 1:, 1:]
    least = rounded.topk(49, -1).values[..., -1:]
    assert ((rounded >= least).sum(-1) > 49).any(), "the check can fail"


def test_a_score_that_is_not_a_number_shows_in_the_result():
    q, k, v = (t.detach() for t in qkv_of(1, 1, 9, 4))
    k[0, 0, 4] = torch.nan
    assert fk.topk_attention(q, k, v, 3).isnan().any(-1).all()


def test_fused_projections_need_no_copy():
    qkv = torch.randn(2, 17, 3, 4, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    got = fk.topk_attention(q, k, v, 4)
    assert torch.equal(got, fk.topk_attention(q.contiguous(), k.contiguous(), v.contiguous(), 4))


X = torch.zeros(2, 3, 9, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.topk_attention(X, X, X, 9), ValueError, r"topk: expected 1..8, the number of patches, got 9"),
        (lambda: fk.topk_attention(X, X, X, 0), ValueError, "topk: expected 1..8"),
        (lambda: fk.topk_attention(X, X, X, 1, num_prefix=9), ValueError, "num_prefix: expected 0..8"),
        (lambda: fk.topk_attention(X, X, X, 1, num_prefix=-1), ValueError, "num_prefix: expected 0..8"),
        (lambda: fk.topk_attention(X, X[:1], X, 1), ValueError, r"k: expected \(2, 3, 9, 4\) on cpu like q, got \(1"),
        (lambda: fk.topk_attention(X, X, X.double(), 1), TypeError, "v: expected floats of one dtype for q, k and v"),
        (lambda: fk.topk_attention(X[0], X, X, 1), ValueError, r"q: expected shape \(B, H, N, d\)"),
        (lambda: fk.topk_attention(X.int(), X.int(), X.int(), 1), TypeError, "k: expected floats"),
        (lambda: fk.topk_attention(X, X, X, 1, scale=0.0), ValueError, "scale: expected a finite number above 0"),
        (
            lambda: fk.topk_attention(X, X, X, 1, labels=torch.zeros(2, 9, dtype=torch.int64)),
            ValueError,
            r"labels: expected shape \(2, 8\), got \(2, 9\)",
        ),
        (lambda: fk.topk_attention(X, X, X, 1, labels=torch.zeros(2, 8)), TypeError, "labels: expected torch.int64"),
    ],
    ids=range(11),
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "patches", "topk", "num_prefix", "width"),
    [(2, 3, 33, 1, 0, 31), (1, 2, 250, 249, 3, 33), (3, 1, 7, 5, 1, 96), (1, 5, 64, 64, 0, 80), (2, 2, 196, 49, 1, 5)],
)
def test_scores_that_are_exact_select_as_float64_does(dtype, batch, heads, patches, topk, num_prefix, width):
    """Quarters, whose products every implementation sums without rounding: ties, counts and gradients are decided."""
    g = torch.Generator().manual_seed(patches)
    packed = (4 * torch.randn((batch, num_prefix + patches, 3, heads, width), generator=g)).round() / 4
    labels = torch.randint(-2, 3, (batch, patches), generator=g) * 2**40
    tensors = packed.to(dtype).permute(2, 0, 3, 1, 4).unbind()  # strided, as a projection gives them
    weights = torch.randn((batch, heads, width, num_prefix + patches), generator=g).to(dtype).transpose(2, 3)
    named = {"num_prefix": num_prefix, "scale": 0.125, "labels": labels}

    def run(topk_attention, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out, hits = topk_attention(*leaves, topk, **named)
        return hits, [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    hits, got = run(fk.topk_attention, *tensors)
    expected_hits, expected = run(dispatch.reference("topk").topk_attention, *(t.double() for t in tensors))
    assert torch.equal(hits, expected_hits)
    for g, e in zip(got, expected, strict=True):
        assert (g.double() - e).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * e.norm()
