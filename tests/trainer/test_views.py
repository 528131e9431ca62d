"""Random parameters of views: ranges with both ends, frequencies, independence, repetition."""

import pytest
import torch
from fastmim_kernels import shift_flip_jitter
from slow_reference import cut_view, draw_flips, draw_shifts, make_rng

from fastmim.views import ColorConfig, random_color, random_flip, random_shift

MANY = torch.arange(20_000)
# Five standard deviations of a frequency over 20,000 draws at p = 1/2, the widest.
FIVE_SIGMA = 5 * (0.25 / 20_000) ** 0.5


def color(config=ColorConfig(), ids=MANY, rng=None):  # noqa: B008 - frozen
    return random_color(make_rng() if rng is None else rng, ids, config)


# ---- flip


def test_random_flip_mirrors_every_second_image():
    flips = random_flip(make_rng(), MANY)
    assert flips.dtype == torch.bool and flips.shape == (20_000,)
    assert abs(flips.float().mean() - 0.5) < FIVE_SIGMA
    assert flips[:200].tolist() == draw_flips(make_rng(), MANY[:200])


@pytest.mark.parametrize("probability, rate", [(0.0, 0), (0.25, 0.25), (1.0, 1)])
def test_random_flip_takes_a_probability(probability, rate):
    assert abs(random_flip(make_rng(), MANY, probability).float().mean() - rate) <= FIVE_SIGMA * (0 < rate < 1)


# ---- shift


@pytest.mark.parametrize("largest", [31, 15, 7, 2, 1, 0])
def test_random_shift_reaches_both_ends_and_all_between_equally(largest):
    shift = random_shift(make_rng(), MANY, largest)
    assert shift.dtype == torch.int64 and shift.shape == (20_000, 2)
    for axis in shift.T:
        counts = torch.bincount(axis, minlength=largest + 1)
        assert len(counts) == largest + 1, "nothing beyond the largest shift"
        rate = 1 / (largest + 1)
        assert ((counts / 20_000 - rate).abs() <= 5 * (rate * (1 - rate) / 20_000) ** 0.5).all()
    assert [tuple(s) for s in shift[:200].tolist()] == draw_shifts(make_rng(), MANY[:200], largest)


def test_random_shift_rows_and_columns_are_independent():
    top, left = random_shift(make_rng(), MANY, 31).double().T
    correlation = torch.corrcoef(torch.stack([top, left]))[0, 1]
    assert abs(correlation) < 5 / 20_000**0.5


def test_random_shift_does_not_follow_the_flip():
    flips = random_flip(make_rng(), MANY)
    shift = random_shift(make_rng(), MANY, 31).double()
    deviation = 5 * 9.24 * (2 / 10_000) ** 0.5  # five sigma of a difference of means of uniform 0..31
    assert ((shift[flips].mean(0) - shift[~flips].mean(0)).abs() < deviation).all()


# ---- color


def test_random_color_defaults_are_cmae_s():
    assert ColorConfig() == ColorConfig(0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5, (0.1, 2.0))


@pytest.mark.parametrize(
    "name, low, high", [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4), ("hue", -0.1, 0.1)]
)
def test_random_color_strengths_are_uniform_over_their_range(name, low, high):
    values = getattr(color()["jitter"], name)
    assert values.shape == (20_000,) and values.is_floating_point()
    assert low - 1e-6 <= values.min() < low + 0.001 * (high - low) and values.max() <= high + 1e-6
    assert values.max() > high - 0.001 * (high - low)
    # Quarters of the range hold a quarter of the draws each.
    counts = torch.histc(values, 4, low, high) / 20_000
    assert ((counts - 0.25).abs() < 5 * (0.1875 / 20_000) ** 0.5).all()


def test_random_color_factors_are_never_negative():
    """torchvision: max(0, 1 - strength)."""
    jitter = color(ColorConfig(brightness=1.5, contrast=2.0, saturation=1.0))["jitter"]
    assert jitter.brightness.min() >= 0 and jitter.contrast.min() >= 0 and jitter.saturation.min() >= 0
    assert jitter.brightness.max() > 2.49 and jitter.contrast.max() > 2.99


def test_random_color_happens_as_often_as_configured():
    drawn = color()
    rates = {"jitter": drawn["jitter"].apply, "grey": drawn["grey"], "blur": drawn["blur_sigma"] > 0}
    for name, expected in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.5)):
        assert abs(rates[name].float().mean() - expected) < FIVE_SIGMA, name


def test_random_color_decisions_are_independent():
    drawn = color()
    jitter = drawn["jitter"]
    columns = [
        jitter.apply, drawn["grey"], drawn["blur_sigma"] > 0, jitter.brightness, jitter.contrast, jitter.saturation,
        jitter.hue, jitter.order[:, 0], random_flip(make_rng(), MANY), random_shift(make_rng(), MANY, 31)[:, 0],
    ]  # fmt: skip
    correlations = torch.corrcoef(torch.stack([c.double() for c in columns])) - torch.eye(len(columns))
    assert correlations.abs().max() < 5 / 20_000**0.5


def test_random_color_blur_is_uniform_between_its_ends_where_it_happens():
    drawn = color()
    assert drawn["max_blur_sigma"] == 2.0
    sigma = drawn["blur_sigma"][drawn["blur_sigma"] > 0]
    assert sigma.min() >= 0.1 and sigma.max() <= 2.0
    assert sigma.min() < 0.105 and sigma.max() > 1.995
    assert abs(sigma.mean() - 1.05) < 5 * (1.9 / 12**0.5) / len(sigma) ** 0.5


def test_random_color_order_is_a_uniform_permutation():
    order = color()["jitter"].order
    assert order.dtype == torch.int64
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(20_000, 4))
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(codes) == 24
    assert ((codes / 20_000 - 1 / 24).abs() < 5 * (1 / 24 * 23 / 24 / 20_000) ** 0.5).all()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_random_color_probability_0_is_never_and_1_is_always(probability):
    drawn = color(
        ColorConfig(jitter_probability=probability, grey_probability=probability, blur_probability=probability)
    )
    for happens in (drawn["jitter"].apply, drawn["grey"], drawn["blur_sigma"] > 0):
        assert (happens == bool(probability)).all()


def test_random_color_without_strength_is_neutral():
    jitter = color(ColorConfig(brightness=0, contrast=0, saturation=0, hue=0))["jitter"]
    assert (jitter.brightness == 1).all() and (jitter.contrast == 1).all() and (jitter.saturation == 1).all()
    assert (jitter.hue == 0).all()


def test_random_draws_repeat_and_depend_on_seed_step_and_id_alone():
    def draw(rng, ids):
        drawn = color(ids=ids, rng=rng)
        parts = [drawn["grey"], drawn["blur_sigma"], *drawn["jitter"]]
        return [random_flip(rng, ids), random_shift(rng, ids, 31), *parts]

    ids = torch.tensor([3, 4, 1 << 33, 9])
    first = draw(make_rng(), ids)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(make_rng(), ids)))
    assert all(torch.equal(a[2:3], b) for a, b in zip(first, draw(make_rng(), ids[2:3])))
    for other in (draw(make_rng(step=12), ids), draw(make_rng(seed=4), ids), draw(make_rng(), ids + 1)):
        assert not torch.equal(first[1], other[1]) and not torch.equal(first[6], other[6])


def test_random_color_is_what_the_view_op_takes():
    """Keyword arguments fit; without any probability the view is the exact window of the mirrored crop."""
    torch.manual_seed(0)
    crops = torch.randint(0, 256, (6, 3, 24, 32), dtype=torch.uint8)
    ids, rng = torch.arange(6), make_rng()
    flip, shift = random_flip(rng, ids), random_shift(rng, ids, 7)
    off = ColorConfig(jitter_probability=0, grey_probability=0, blur_probability=0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    window = dict(size=(16, 24), offset=shift, flip=flip, mean=mean, std=std)
    view = shift_flip_jitter(crops, **window, **color(off, ids, rng))
    for i in range(6):
        exact = cut_view(crops[i], (16, 24), *shift[i].tolist(), bool(flip[i]), mean, std)
        torch.testing.assert_close(view[i].double(), exact, rtol=0, atol=2e-6)
    always = ColorConfig(jitter_probability=1, grey_probability=1, blur_probability=1)
    colored = shift_flip_jitter(crops, **window, **color(always, ids, rng))
    assert colored.shape == view.shape and colored.isfinite().all()
    assert (colored - view).abs().amax((1, 2, 3)).min() > 0.1
