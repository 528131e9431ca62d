"""Native CPU kernels: precision against torch's own, any strides, addresses, gradients, selection, errors."""

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels import cases, dispatch
from made_up import NATIVE, bytes_of, permutations, random

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not NATIVE, reason=dispatch.load("gather", "native"))


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "native")


# Precision: not worse than torch's own in the same dtype, by the rule error <= 1.5 x torch's error + one last bit.

OPS = {
    "patchify_gather": lambda dtype: dict(
        images=bytes_of(2, 3, 21, 35), ids=permutations(2, 15)[:, :7], patch_size=7, mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25), dtype=dtype,
    ),
    "gather_tokens": lambda dtype: dict(x=random(2, 9, 37, dtype=dtype), ids=permutations(2, 9)[:, :4]),
    "restore_tokens": lambda dtype: dict(
        x=random(2, 6, 37, dtype=dtype), mask_token=random(37, seed=1, dtype=dtype), pos=random(14, 37, seed=2, dtype=dtype),
        ids_restore=permutations(2, 13),
    ),
    "masked_pixel_loss": lambda dtype: dict(
        pred=random(3, 5, 75, dtype=dtype), images=bytes_of(3, 3, 20, 15), ids_masked=permutations(3, 12)[:, :5],
        patch_size=5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25),
    ),
    "contrastive_loss": lambda dtype: dict(
        q=random(5, 37, dtype=dtype) / 6, k=random(300, 37, seed=1, dtype=dtype) / 6, offset=131, temperature=0.07,
        label_smoothing=0.1,
    ),
    "topk_attention": lambda dtype: dict(
        q=random(2, 3, 100, 20, dtype=dtype), k=random(2, 3, 100, 20, seed=1, dtype=dtype),
        v=random(2, 3, 100, 20, seed=2, dtype=dtype), topk=23,
    ),
    "add_layer_norm": lambda dtype: dict(
        x=random(3, 11, 129, dtype=dtype), residual=random(3, 11, 129, seed=1, dtype=dtype),
        weight=random(129, seed=2, dtype=dtype), bias=random(129, seed=3, dtype=dtype),
        scale=random(129, seed=4, dtype=dtype), row_scale=torch.tensor([0.0, 1.25, 1.25]), prenorm=True,
    ),
}  # fmt: skip
SOURCES = {
    "patchify_gather": (), "gather_tokens": ("x",), "restore_tokens": ("x", "mask_token", "pos"),
    "masked_pixel_loss": ("pred",), "contrastive_loss": ("q", "k"), "topk_attention": ("q", "k", "v"),
    "add_layer_norm": ("x", "residual", "weight", "bias", "scale"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("function", OPS)
def test_error_is_not_above_torchs_own(function, dtype, monkeypatch):
    case = cases.Case("", function, lambda _: OPS[function](dtype), grads=SOURCES[function])
    ours = cases.call(cases.public(case), case, case.inputs(CPU))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    theirs = cases.call(cases.public(case), case, case.inputs(CPU))
    truth = cases.call(cases.public(case), case, cases.upcast(case.inputs(CPU)))
    for got, torchs, exact in zip(ours, theirs, truth, strict=True):
        assert got.dtype == torchs.dtype and got.shape == torchs.shape
        scale = exact.double().abs().max().clamp_min(1e-30)
        error, allowed = ((t.double() - exact.double()).abs().max() / scale for t in (got, torchs))
        assert error <= 1.5 * allowed + torch.finfo(got.dtype).eps


def test_half_precision_is_converted_as_torch_does():
    """All 65536 float16 and bfloat16 numbers to float32, and floats of every size, ties and NaN back."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 256)
        nothing = {"mask_token": torch.zeros(256), "pos": torch.full((256, 256), -0.0), "num_prefix": 0}
        wide = fk.restore_tokens(numbers, ids_restore=torch.arange(256)[None], **nothing)
        torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)

        bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
        ties = torch.arange(0, 2**16, dtype=torch.int64) << 16 | (0x8000 if dtype == torch.bfloat16 else 0x1000)
        floats = torch.cat([bits, ties])[: 128 * 1000].to(torch.int32).view(torch.float32).view(1, -1, 128)
        tokens = floats.shape[1]
        zero = fk.patchify_gather(floats.permute(0, 2, 1)[..., None], torch.arange(tokens)[None], 1, dtype=dtype)
        torch.testing.assert_close(zero, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


# Strides, sizes and addresses.


def test_strided_inputs_equal_contiguous_ones():
    images = bytes_of(2, 3, 24, 20)
    window = dict(size=(16, 16), offset=torch.tensor([[8, 4], [0, 1]]), flip=torch.tensor([True, False]))
    variants = [
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([images, images], -1)[..., 1],
        images.flip(0).contiguous().as_strided(images.shape, images.stride())[[1, 0]],
    ]
    views = fk.shift_flip_jitter(images, **window)
    patches = fk.patchify_gather(images, None, 8, **window)
    for strided in variants:
        assert torch.equal(fk.shift_flip_jitter(strided, **window), views)
        assert torch.equal(fk.patchify_gather(strided, None, 8, **window), patches)
        assert torch.equal(fk.patchify_gather(strided / 255, None, 8, **window), patches)

    x, ids = random(3, 10, 16), permutations(3, 9)
    for strided in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], 2)[..., :16],
        x[:1].expand(3, -1, -1),
    ):
        assert torch.equal(fk.gather_tokens(strided[:, 1:], ids), fk.gather_tokens(strided[:, 1:].contiguous(), ids))
        restored = fk.restore_tokens(strided[:, :5], x[0, 0], x[0], ids)
        assert torch.equal(restored, fk.restore_tokens(strided[:, :5].contiguous(), x[0, 0], x[0], ids))


def test_gradients_of_expanded_and_transposed_gradients():
    x, ids = random(2, 6, 8).requires_grad_(), permutations(2, 6)[:, :4]
    for grad in (torch.ones(1).expand(2, 4, 8), random(2, 8, 4).transpose(1, 2)):
        (got,) = torch.autograd.grad(fk.gather_tokens(x, ids), x, grad)
        expected = torch.zeros(2, 6, 8).scatter_(1, ids[:, :, None].expand(-1, -1, 8), grad)
        assert torch.equal(got, expected)


def test_ids_that_repeat_add_up_in_the_gradient():
    x = random(1, 5, 33).requires_grad_()
    ids = torch.tensor([[2, 4, 2, 2]])
    grad = random(1, 4, 33, seed=1)
    (got,) = torch.autograd.grad(fk.gather_tokens(x, ids), x, grad)
    expected = torch.zeros(1, 5, 33).index_add_(1, ids[0], grad)
    torch.testing.assert_close(got, expected)


def test_addresses_beyond_2_to_the_31():
    """Rows and images that lie more than 2**31 elements apart, in memory of which only those pages are touched."""
    far = 2**31 + 5
    try:
        memory = torch.empty(2 * far + 64, dtype=torch.uint8)
    except RuntimeError as e:
        pytest.skip(f"no 4 GB of address space: {e}")
    images = memory.as_strided((3, 1, 4, 4), (far, 16, 4, 1))
    expected = bytes_of(3, 1, 4, 4)
    images.copy_(expected)
    assert torch.equal(fk.patchify_gather(images, None, 2), fk.patchify_gather(expected, None, 2))
    assert torch.equal(fk.shift_flip_jitter(images, size=(4, 4)), expected / 255)

    tokens = memory[: (far // 2) * 4].view(torch.bfloat16).as_strided((1, 3, 4), (1, far // 2, 1))
    tokens.copy_(random(1, 3, 4))
    assert torch.equal(fk.gather_tokens(tokens, torch.tensor([[2, 0]])), tokens[:, [2, 0]])


# Gradients: weights of the loss, several backward passes, second derivatives.


def loss_inputs(dtype=torch.float32):
    inputs = OPS["masked_pixel_loss"](dtype)
    return inputs.pop("pred").requires_grad_(), inputs


@pytest.mark.parametrize("weight", [1.0, 0.3, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_weighted_loss_has_a_gradient_rounded_once(weight, dtype):
    pred, inputs = loss_inputs(dtype)
    (got,) = torch.autograd.grad(weight * fk.masked_pixel_loss(pred, **inputs), pred)
    wide = pred.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(weight * fk.masked_pixel_loss(wide, **inputs), wide)
    info = torch.finfo(dtype)
    # float32: the target's statistics are float32 as well. float16: small gradients are subnormal.
    atol = 1e-6 * float(exact.abs().max()) + info.smallest_normal * info.eps
    torch.testing.assert_close(got.double(), exact, rtol=max(info.eps, 1e-6), atol=atol)


def test_loss_backward_can_be_repeated_and_added_up():
    pred, inputs = loss_inputs()
    loss = fk.masked_pixel_loss(pred, **inputs)
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    once = once.clone()
    for passes in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(pred.grad, passes * once)
    assert torch.equal(torch.autograd.grad(loss, pred)[0], once)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (f, n)
        for f in ("masked_pixel_loss", "contrastive_loss", "topk_attention", "add_layer_norm")
        for n in SOURCES[f][:1]
    ],
)
def test_second_derivatives_are_refused_not_wrong(function, name):
    inputs = OPS[function](torch.float32)
    inputs.pop("prenorm", None)
    source = inputs[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{function}: .*FASTMIM_KERNELS=reference"):
        (grad,) = torch.autograd.grad(getattr(fk, function)(**inputs).sum(), source, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("function", ["gather_tokens", "restore_tokens"])
def test_linear_ops_have_second_derivatives(function):
    inputs = OPS[function](torch.float32)
    sources = [inputs[name].requires_grad_() for name in SOURCES[function]]
    out = getattr(fk, function)(**inputs)
    weight = random(*out.shape, seed=9).requires_grad_()
    grads = torch.autograd.grad(out, sources, weight, create_graph=True)
    directions = [random(*g.shape, seed=10 + i) for i, g in enumerate(grads)]
    (got,) = torch.autograd.grad(grads, weight, directions)
    # A linear op: its gradient, applied to directions, is the op of those directions.
    expected = getattr(fk, function)(**(inputs | dict(zip(SOURCES[function], directions, strict=True))))
    torch.testing.assert_close(got, expected)


# Top-K selection on rows where a search can go wrong.


@pytest.mark.parametrize("kind", ["ties", "two values", "tiny and huge", "infinite", "signed zeros"])
@pytest.mark.parametrize("topk", [1, 7, 39, 40])
def test_topk_selects_what_sorting_selects(kind, topk):
    scores = random(1, 2, 40, 40)
    scores = {
        "ties": scores.mul(2).round(),
        "two values": scores.sign(),
        "tiny and huge": scores * 10 ** (15 * random(1, 2, 40, 40, seed=1)).clamp(-30, 30),
        "infinite": torch.where(scores > 1.5, torch.inf, torch.where(scores < -1.5, -torch.inf, scores)),
        "signed zeros": torch.where(scores > 0.5, scores, torch.where(scores > 0, 0.0, -0.0)),
    }[kind]
    # With k the identity, the scores are q itself.
    q, k = scores, torch.eye(40).expand(1, 2, -1, -1).contiguous()
    if kind == "infinite":
        q = scores.nan_to_num(posinf=3e38, neginf=-3e38)
    v, labels = random(1, 2, 40, 40, seed=2), torch.zeros(1, 40, dtype=torch.int64)
    out, kept = fk.topk_attention(q, k, v, topk, num_prefix=0, scale=1.0, labels=labels)
    least = q.sort(-1, descending=True).values[..., topk - 1 : topk]
    assert torch.equal(kept, (q >= least).sum(-1))
    weights = q.double().masked_fill(q < least, -torch.inf).softmax(-1)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=1e-5, atol=1e-5)


def test_topk_of_many_short_rows_and_few_long_ones_equals_reference(monkeypatch):
    """Blocks of several images, and of some heads of one image."""
    for batch, heads, length in ((70, 3, 50), (1, 3, 600)):
        qkv = random(3, batch, length, heads, 8).transpose(2, 3)
        labels = permutations(batch, length - 1) % 3
        results = []
        for backend in ("native", "reference"):
            monkeypatch.setenv(dispatch.VARIABLE, backend)
            q, k, v = (t.detach().clone().requires_grad_() for t in qkv)
            out, kept = fk.topk_attention(q, k, v, length // 4, labels=labels)
            results.append([out, kept, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Errors, and what the reference is left with.


def test_ids_out_of_range_raise_in_the_kernel_too():
    """Under torch.compile the public functions look at no values."""
    x, ids = random(2, 5, 4), torch.tensor([[0, 4], [5, 1]])
    for bad in (ids, -ids):
        with pytest.raises(IndexError, match="gather_tokens: expected ids and offsets inside"):
            torch.ops.fastmim.gather_tokens(x, bad)
        with pytest.raises(IndexError):
            torch.ops.fastmim.gather_tokens_backward(random(2, 2, 4), bad, 5)
        with pytest.raises(IndexError):
            torch.ops.fastmim.patchify_gather(
                bytes_of(2, 1, 2, 5), bad, 1, None, None, [1, 5], None, None, torch.float32
            )
    with pytest.raises(IndexError):
        offset = torch.tensor([[0, 0], [0, 2]])
        torch.ops.fastmim.patchify_gather(
            bytes_of(2, 1, 2, 5), None, 1, None, None, [1, 4], offset, None, torch.float32
        )


def test_float64_and_integers_are_computed_by_the_reference():
    x, ids = torch.arange(12).view(1, 4, 3), torch.tensor([[3, 1]])
    assert fk.gather_tokens(x, ids).tolist() == [[[9, 10, 11], [3, 4, 5]]]
    assert fk.gather_tokens(x.double(), ids).dtype == torch.float64
    assert fk.patchify_gather(bytes_of(1, 3, 4, 4), None, 2, dtype=torch.float64).dtype == torch.float64


def test_images_that_need_a_gradient_get_one():
    images = torch.rand(1, 1, 2, 2).requires_grad_()
    fk.patchify_gather(images, torch.tensor([[3]]), 1).sum().backward()
    assert images.grad.flatten().tolist() == [0, 0, 0, 1]
