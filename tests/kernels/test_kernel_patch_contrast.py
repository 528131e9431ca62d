"""Patch contrast against Python floats, its bounds, and its gradients."""

import math

import fastmim_kernels as fk
import pytest
import torch
from torch.nn import functional as F


def features_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def partition(groups, patches, members):
    return fk.partition(torch.tensor([3, 5]), torch.arange(groups), patches, members)


def slow_loss(features, src, temperature):
    """The formula, with a loop for every index; patches without a partner cost 0."""
    losses = []
    for mixture, row in zip(features.tolist(), src.tolist(), strict=True):
        unit = []
        for vector in mixture:
            norm = math.sqrt(sum(x * x for x in vector))
            unit.append([x / norm for x in vector])
        count = len(unit)
        s = [[sum(a * b for a, b in zip(u, w)) / temperature for w in unit] for u in unit]
        for i in range(count):
            partners = [p for p in range(count) if p != i and row[p] == row[i]]
            total = sum(math.exp(s[i][a]) for a in range(count) if a != i)
            terms = [math.log(math.exp(s[i][p]) / total) for p in partners]
            losses.append(-sum(terms) / len(terms) if terms else 0.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.25, 0.1])
@pytest.mark.parametrize(
    ("groups", "patches", "members", "width"), [(2, 16, 4, 9), (3, 11, 3, 20), (1, 9, 9, 5), (2, 6, 1, 3), (1, 2, 2, 1)]
)
def test_patch_contrastive_loss_equals_python_floats(groups, patches, members, width, temperature):
    features, src = features_of(groups, patches, width), partition(groups, patches, members)
    got = fk.patch_contrastive_loss(features, src, temperature)
    assert got.dtype == torch.float32 and got.ndim == 0
    assert float(got) == pytest.approx(slow_loss(features, src, temperature), rel=2e-6, abs=1e-6)


def test_unequal_shares_and_a_patch_alone():
    features, src = features_of(1, 5, 4), torch.tensor([[0, 0, 0, 0, 7]])
    got = fk.patch_contrastive_loss(features, src, 0.25)
    assert float(got) == pytest.approx(slow_loss(features, src, 0.25), rel=2e-6)
    assert slow_loss(features, src, 0.25) > 0.5, "the one without partner is not all there is"


def test_features_without_structure_start_at_the_logarithm_of_the_others():
    """196 patches of 4 images: log(195) = 5.273."""
    loss = fk.patch_contrastive_loss(features_of(4, 196, 768), partition(4, 196, 4), 0.25)
    assert float(loss) == pytest.approx(math.log(195), abs=0.02)
    assert math.log(195) == pytest.approx(5.273, abs=1e-3)


@pytest.mark.parametrize(("shape", "expected"), [("simplex", 3.886), ("orthogonal", 3.926)])
def test_perfect_clusters_reach_the_floor(shape, expected):
    """Every image one point: 48 partners at 1, 147 others at 0, or at -1/3 in a regular simplex."""
    src = partition(2, 196, 4)
    codes = F.one_hot(src, 4).float()
    if shape == "simplex":
        codes = codes - 0.25
    others = 0.0 if shape == "orthogonal" else -1 / 3
    exact = math.log(48 + 147 * math.exp((others - 1) / 0.25))
    loss = float(fk.patch_contrastive_loss(codes, src, 0.25))
    assert loss == pytest.approx(exact, abs=1e-5) and loss == pytest.approx(expected, abs=1e-3)
    assert loss > math.log(48)


def test_lengths_of_the_features_do_not_matter_and_neither_does_their_order():
    features, src = features_of(2, 12, 7), partition(2, 12, 3)
    loss = fk.patch_contrastive_loss(features, src, 0.25)
    scaled = features * torch.linspace(0.01, 100, 12)[:, None]
    torch.testing.assert_close(fk.patch_contrastive_loss(scaled, src, 0.25), loss)
    order = torch.randperm(12)
    torch.testing.assert_close(fk.patch_contrastive_loss(features[:, order], src[:, order], 0.25), loss)
    torch.testing.assert_close(fk.patch_contrastive_loss(features, (src + 1) % 3, 0.25), loss)


def test_mixtures_do_not_meet():
    features, src = features_of(3, 12, 7), partition(3, 12, 3)
    alone = [fk.patch_contrastive_loss(features[g : g + 1], src[g : g + 1], 0.25) for g in range(3)]
    torch.testing.assert_close(fk.patch_contrastive_loss(features, src, 0.25), sum(alone) / 3)


def test_gradients_of_both_sides():
    features = features_of(2, 7, 4, dtype=torch.float64).requires_grad_()
    src = partition(2, 7, 3)
    assert torch.autograd.gradcheck(lambda f: fk.patch_contrastive_loss(f, src, 0.25), features)


def test_a_step_along_the_gradient_brings_patches_of_an_image_together():
    features, src = features_of(2, 16, 8).requires_grad_(), partition(2, 16, 4)
    first = fk.patch_contrastive_loss(features, src, 0.25)
    (gradient,) = torch.autograd.grad(first, features)
    assert fk.patch_contrastive_loss(features - 10 * gradient, src, 0.25) < first - 0.05


def test_autocast_does_not_degrade_the_similarities():
    features, src = features_of(2, 49, 64), partition(2, 49, 4)
    plain = fk.patch_contrastive_loss(features, src, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fk.patch_contrastive_loss(features, src, 0.1)
        u = F.normalize(features, dim=-1)
        degraded = u @ u.transpose(1, 2)
    assert torch.equal(inside, plain) and inside.dtype == torch.float32
    assert degraded.dtype == torch.bfloat16, "the check can fail"


def test_bfloat16_features_are_multiplied_in_float32():
    features, src = features_of(2, 16, 32, dtype=torch.bfloat16), partition(2, 16, 4)
    loss = fk.patch_contrastive_loss(features, src, 0.25)
    assert float(loss) == pytest.approx(slow_loss(features.float(), src, 0.25), rel=2e-6)


@pytest.mark.parametrize(
    ("features", "src", "temperature", "error", "message"),
    [
        ((0, 4, 3), (0, 4), 0.25, ValueError, r"features: expected at least 1 mixture of 2 patches, got \(0, 4, 3\)"),
        ((2, 1, 3), (2, 1), 0.25, ValueError, "features: expected at least 1 mixture of 2 patches"),
        ((2, 4), (2, 4), 0.25, ValueError, r"features: expected shape \(G, L, D\)"),
        ((2, 4, 3), (2, 5), 0.25, ValueError, r"src: expected shape \(2, 4\), got \(2, 5\)"),
        ((2, 4, 3), (2, 4), 0.0, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    ],
    ids=range(5),
)
def test_wrong_arguments_raise(features, src, temperature, error, message):
    with pytest.raises(error, match=message):
        fk.patch_contrastive_loss(torch.zeros(features), torch.zeros(src, dtype=torch.int64), temperature)


def test_wrong_dtypes_raise():
    src = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match="features: expected floats"):
        fk.patch_contrastive_loss(torch.zeros(1, 4, 3, dtype=torch.int64), src, 0.25)
    with pytest.raises(TypeError, match=r"src: expected torch\.int64"):
        fk.patch_contrastive_loss(torch.zeros(1, 4, 3), src.float(), 0.25)
