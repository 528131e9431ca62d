"""Moving average: the formula bit for bit, in place, low-precision online tensors."""

import fastmim_kernels as fk
import pytest
import torch


def pairs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (1,), (), (129,), (0,)]
    return [torch.randn(s, generator=g) for s in shapes], [torch.randn(s, generator=g).to(dtype) for s in shapes]


def formula(t, o, momentum):
    """t + (1 - m) * (o - t) in float32 with one rounding after the product and sum, as a fused multiply-add has it."""
    weight = torch.tensor(1 - momentum, dtype=torch.float32).double()
    return (t.double() + weight * (o.to(t.dtype) - t).double()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.51, 0.9, 0.996, 0.99996])
def test_ema_update_is_the_formula(momentum, dtype):
    targets, onlines = pairs(dtype)
    before = [t.clone() for t in targets]
    addresses = [t.data_ptr() for t in targets]
    assert fk.ema_update(targets, onlines, momentum) is None
    for t, b, o in zip(targets, before, onlines, strict=True):
        fused, plain = formula(b, o, momentum), b + (1 - momentum) * (o.to(b.dtype) - b)
        assert ((t == fused) | (t == plain)).all()
    assert [t.data_ptr() for t in targets] == addresses


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9, dtype=torch.float64)], ids=["number", "tensor"])
def test_tensors_on_several_devices(momentum):
    """As after offloading some: what lies elsewhere neither stops the others nor is taken for theirs."""
    targets, onlines = pairs()
    expected = [t.clone() for t in targets]
    fk.ema_update(expected, onlines, momentum)
    away = [torch.empty(3, device="meta"), torch.empty(4, device="meta")]
    fk.ema_update([away[0], *targets, away[1]], [away[0].clone(), *onlines, away[1].clone()], momentum)
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))


def test_momentum_0_copies_and_1_keeps():
    targets, onlines = pairs()
    before = [t.clone() for t in targets]
    fk.ema_update(targets, onlines, 1.0)
    assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))
    fk.ema_update(targets, onlines, 0.0)
    assert all(torch.equal(t, o) for t, o in zip(targets, onlines, strict=True))


def test_equal_pairs_stay_equal():
    targets, _ = pairs()
    onlines = [t.clone() for t in targets]
    for _ in range(5):
        fk.ema_update(targets, onlines, 0.996)
    assert all(torch.equal(t, o) for t, o in zip(targets, onlines, strict=True))


def test_small_increments_are_not_lost():
    target, online = torch.ones(3), torch.full((3,), 1.01, dtype=torch.bfloat16)
    for _ in range(2000):
        fk.ema_update([target], [online], 0.996)
    torch.testing.assert_close(target, online.float(), atol=1e-4, rtol=0)


def test_momentum_as_a_tensor():
    (targets, onlines), (again, _) = pairs(), pairs()
    fk.ema_update(targets, onlines, torch.tensor(0.996))
    fk.ema_update(again, onlines, 0.996)
    for a, b in zip(targets, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_parameters_with_gradient_and_strided_tensors():
    online = torch.nn.Parameter(torch.randn(6, 4))
    target = torch.nn.Parameter(torch.randn(4, 6), requires_grad=False)
    expected = target.detach() + 0.1 * (online.detach().t() - target.detach())
    fk.ema_update((target,), (online.t(),), 0.9)
    torch.testing.assert_close(target.detach(), expected)
    assert not target.requires_grad and target.grad_fn is None


def test_empty_lists_are_accepted():
    assert fk.ema_update([], [], 0.9) is None


@pytest.mark.parametrize(
    ("targets", "onlines", "momentum", "error", "message"),
    [
        ([torch.zeros(2)], [], 0.9, ValueError, "onlines: expected 1 tensors, got 0"),
        (
            [torch.zeros(2)],
            [torch.zeros(3)],
            0.9,
            ValueError,
            r"onlines\[0\]: expected \(2,\) on cpu like its target, got \(3,\)",
        ),
        (
            [torch.zeros(2).bfloat16()],
            [torch.zeros(2)],
            0.9,
            TypeError,
            r"targets\[0\]: expected float32 and a floating online tensor",
        ),
        ([torch.zeros(2)], [torch.zeros(2).long()], 0.9, TypeError, r"targets\[0\]: expected"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.1, ValueError, r"momentum: expected a number in \[0, 1\], got 1.1"),
        (
            [torch.zeros(2)],
            [torch.zeros(2)],
            torch.ones(2),
            ValueError,
            "momentum: expected a number or a 0-dimensional tensor",
        ),
    ],
    ids=range(6),
)
def test_wrong_arguments_raise(targets, onlines, momentum, error, message):
    with pytest.raises(error, match=message):
        fk.ema_update(targets, onlines, momentum)
