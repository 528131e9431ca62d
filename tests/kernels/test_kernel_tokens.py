"""Token gather and restore against loops; gradients against finite differences."""

import fastmim_kernels as fk
import pytest
import torch

RNG = torch.tensor([1, 2])


def masks(batch, patches, keep):
    return fk.random_masking(RNG, torch.arange(batch), patches, keep)


def slow_restore(x, mask_token, pos, ids_restore, num_prefix):
    keep = x.shape[1] - num_prefix
    images = []
    for tokens, restore in zip(x, ids_restore.tolist(), strict=True):
        rows = [tokens[i] for i in range(num_prefix)]
        rows += [tokens[num_prefix + place] if place < keep else mask_token for place in restore]
        images.append(torch.stack([row + p for row, p in zip(rows, pos, strict=True)]))
    return torch.stack(images)


@pytest.mark.parametrize("width", [1, 100, 768])
@pytest.mark.parametrize(("patches", "keep"), [(196, 49), (197, 50), (49, 49), (1, 1)])
def test_gather_tokens_equals_a_loop(patches, keep, width):
    x, ids = torch.randn(2, patches, width), masks(2, patches, keep).ids_keep
    expected = torch.stack([torch.stack([x[b, i] for i in row]) for b, row in enumerate(ids.tolist())])
    assert torch.equal(fk.gather_tokens(x, ids), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_gather_tokens_keeps_dtype(dtype):
    x = torch.arange(24).view(2, 4, 3).to(dtype)
    got = fk.gather_tokens(x, torch.tensor([[3], [0]]))
    assert got.dtype == dtype and got.tolist() == [[[9, 10, 11]], [[12, 13, 14]]]


def test_gather_tokens_of_strided_input():
    x = torch.randn(3, 7, 20).transpose(0, 1)[:, :, ::2]
    ids = torch.tensor([[0, 2]]).expand(7, -1)
    assert torch.equal(fk.gather_tokens(x, ids), fk.gather_tokens(x.contiguous(), ids.contiguous()))


def test_gather_tokens_gradient():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fk.gather_tokens(x, torch.tensor([[4, 0], [1, 2]])), x)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize(("patches", "keep"), [(196, 49), (197, 197), (49, 12), (1, 1), (9, 0)])
def test_restore_tokens_equals_a_loop(patches, keep, num_prefix):
    x, token, pos = torch.randn(2, num_prefix + keep, 100), torch.randn(100), torch.randn(num_prefix + patches, 100)
    ids_restore = masks(2, patches, max(keep, 1)).ids_restore
    got = fk.restore_tokens(x, token, pos, ids_restore, num_prefix)
    assert torch.equal(got, slow_restore(x, token, pos, ids_restore, num_prefix))


def test_restore_undoes_gather():
    x = torch.randn(3, 196, 64)
    ids = masks(3, 196, 49)
    got = fk.restore_tokens(
        fk.gather_tokens(x, ids.ids_keep), torch.zeros(64), torch.zeros(196, 64), ids.ids_restore, num_prefix=0
    )
    assert torch.equal(got, x * (1 - ids.mask)[:, :, None])


@pytest.mark.parametrize("keep", [0, 3, 6])
def test_restore_tokens_gradients(keep):
    leaf = {"dtype": torch.float64, "requires_grad": True}
    x, token, pos = torch.randn(2, 2 + keep, 3, **leaf), torch.randn(3, **leaf), torch.randn(8, 3, **leaf)
    ids_restore = masks(2, 6, max(keep, 1)).ids_restore
    assert torch.autograd.gradcheck(lambda *a: fk.restore_tokens(*a, ids_restore, 2), (x, token, pos))


def test_restore_tokens_promotes_and_rounds_once():
    ids_restore = masks(2, 9, 4).ids_restore
    x, token, pos = torch.randn(2, 5, 8).bfloat16(), torch.randn(8), torch.randn(10, 8)
    full = fk.restore_tokens(x.float(), token, pos, ids_restore)
    assert torch.equal(fk.restore_tokens(x, token, pos, ids_restore), full)
    low = fk.restore_tokens(x, token.bfloat16(), pos.bfloat16(), ids_restore)
    exact = fk.restore_tokens(x.double(), token.bfloat16().double(), pos.bfloat16().double(), ids_restore)
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.float().bfloat16())


X, IDS = torch.zeros(2, 5, 3), torch.tensor([[0, 1, 2, 3, 4, 5]] * 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.gather_tokens(X[0], IDS), ValueError, r"x: expected shape \(B, L, D\), got \(5, 3\)"),
        (
            lambda: fk.gather_tokens(X, IDS),
            IndexError,
            r"ids: expected patch ids in 0..4, got 0..5; ids count patches only",
        ),
        (lambda: fk.gather_tokens(X, IDS[:1]), ValueError, r"ids: expected shape \(2, 6\)"),
        (lambda: fk.gather_tokens(X, IDS.int()), TypeError, "ids: expected torch.int64"),
        (lambda: fk.gather_tokens(X, [0]), TypeError, "ids: expected a tensor"),
        (
            lambda: fk.restore_tokens(X, torch.zeros(4), torch.zeros(7, 3), IDS),
            ValueError,
            r"mask_token: expected shape \(3,\)",
        ),
        (
            lambda: fk.restore_tokens(X, torch.zeros(3), torch.zeros(6, 3), IDS),
            ValueError,
            r"pos: expected shape \(7, 3\), got \(6, 3\)",
        ),
        (
            lambda: fk.restore_tokens(X, torch.zeros(3), torch.zeros(1, 7, 3), IDS),
            ValueError,
            r"pos: expected shape \(P \+ L, D\)",
        ),
        (
            lambda: fk.restore_tokens(X, torch.zeros(3), torch.zeros(7, 3), IDS, 6),
            ValueError,
            "num_prefix: expected 0..5",
        ),
        (
            lambda: fk.restore_tokens(X, torch.zeros(3), torch.zeros(3, 3), IDS[:, :2]),
            ValueError,
            r"x: expected at most 1 \+ 2 tokens, got 5",
        ),
    ],
    ids=range(10),
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
