"""Order, boxes, substitutes: bijections, independence of seeds and epochs, a second implementation of the boxes."""

import math
import statistics

import numpy as np
import pytest
from fastmim_pipelines.sampling import batch_positions, center_box, crop_box, permute, substitute
from hypothesis import given, settings
from hypothesis import strategies as st

MASK = (1 << 64) - 1
whole_numbers = st.integers(-(2**63), 2**64)


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    return permute(seed, epoch, count, np.arange(count))


@given(seed=whole_numbers, epoch=st.integers(0, 10**6), count=st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_permute_is_a_bijection(seed, epoch, count):
    assert np.array_equal(np.sort(order(seed, epoch, count)), np.arange(count))


@pytest.mark.parametrize("count", [4**9 - 1, 4**9, 4**9 + 1])
def test_permute_is_a_bijection_around_a_power_of_four(count):
    assert np.array_equal(np.sort(order(3, 1, count)), np.arange(count))


@given(count=st.integers(1, 2**62), data=st.data())
@settings(max_examples=50, deadline=None)
def test_permute_needs_no_memory_for_the_whole(count, data):
    positions = np.unique(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=50)))
    images = permute(0, 0, count, positions)
    assert images.dtype == np.int64 and images.min() >= 0 and images.max() < count
    assert len(np.unique(images)) == len(positions)


def test_permute_keeps_the_shape_and_splits_at_will():
    whole = order(5, 2, 100)
    assert np.array_equal(permute(5, 2, 100, np.arange(100).reshape(4, 25)), whole.reshape(4, 25))
    assert np.array_equal(np.concatenate([permute(5, 2, 100, np.arange(i, i + 10)) for i in range(0, 100, 10)]), whole)
    assert permute(5, 2, 100, np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(("count", "positions"), [(0, [0]), (10, [10]), (10, [-1]), (2**62 + 1, [0])])
def test_permute_rejects_what_is_out_of_range(count, positions):
    with pytest.raises(ValueError, match="expected"):
        permute(0, 0, count, np.array(positions))


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, estimated from 400,000 random pairs (standard error below 0.002)."""
    i, j = np.random.default_rng(0).integers(0, len(a), (2, 400_000))
    return float(np.mean(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])))


def test_permute_differs_between_seeds_and_epochs():
    keys = [(0, 0), (1, 0), (0, 1), (1, 1), (2**32, 0), (-1, 0)]
    orders = [np.arange(100_000), *(order(*key, 100_000) for key in keys)]
    for a in range(len(orders)):
        for b in range(a):
            assert abs(kendall_tau(orders[a], orders[b])) < 0.02, (a, b)
            assert np.mean(orders[a] == orders[b]) < 1e-3


def test_permute_of_a_key_is_fixed():
    assert order(0, 0, 10).tolist() == [5, 0, 1, 9, 6, 3, 7, 2, 4, 8], (
        "every run's order would change, also a resumed one's"
    )


def test_permute_leaves_no_local_structure():
    steps = np.diff(order(7, 3, 100_000).astype(float))
    assert abs(np.mean(np.abs(steps)) - 100_000 / 3) < 300  # neighbors are as far apart as random pairs
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.02


@pytest.mark.parametrize("count", [3, 4])
def test_permute_draws_every_permutation_equally_often(count):
    each = 960 // math.factorial(count)
    _, times = np.unique([order(seed, 0, count) for seed in range(960)], axis=0, return_counts=True)
    freedom = math.factorial(count) - 1
    assert len(times) == freedom + 1
    assert np.sum((times - each) ** 2 / each) < freedom + 3 * math.sqrt(2 * freedom)


@given(steps=st.integers(1, 20), local=st.integers(1, 8), world=st.integers(1, 8))
def test_batch_positions_of_all_ranks_make_up_the_epoch(steps, local, world):
    taken = [batch_positions(step, local * world, rank, world) for step in range(steps) for rank in range(world)]
    assert np.array_equal(np.concatenate(taken), np.arange(steps * local * world))


@pytest.mark.parametrize(("batch", "rank", "world"), [(10, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2)])
def test_batch_positions_rejects_what_does_not_divide(batch, rank, world):
    with pytest.raises(ValueError, match="expected"):
        batch_positions(0, batch, rank, world)


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox4x64-10, after Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = x0 * 0xD2E7470EE14C6C93, x2 * 0xCA5A826395121157
        x0, x1, x2, x3 = (second >> 64) ^ x1 ^ k0, second & MASK, (first >> 64) ^ x3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [x0, x1, x2, x3]


def slow_crop_box(seed, epoch, sample_id, view, width, height, scale, ratio):
    for attempt in range(10):
        block = philox4x64([attempt + 1, sample_id, epoch, view], [seed & MASK, 0x63726F70])
        area_u, aspect_u = (word // 2**11 / 2**53 for word in block[:2])
        area = (scale[0] + (scale[1] - scale[0]) * area_u) * (width * height)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * aspect_u)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            return block[2] * (width - w + 1) // 2**64, block[3] * (height - h + 1) // 2**64, w, h
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, min(height, round(width / ratio[0])))
    elif width > ratio[1] * height:
        w = max(1, min(width, round(height * ratio[1])))
    return (width - w) // 2, (height - h) // 2, w, h


sides = st.one_of(st.integers(1, 8), st.integers(1, 3000))
ranges = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: tuple(sorted(pair)))


@given(
    key=st.tuples(whole_numbers, st.integers(0, 2000), st.integers(0, 2**40), st.integers(0, 9)),
    width=sides,
    height=sides,
    scale=ranges,
    ratio=st.sampled_from([(3 / 4, 4 / 3), (0.5, 2.0), (1.0, 1.0), (2.0, 3.0)]),
)
@settings(max_examples=400, deadline=None)
def test_crop_box_equals_a_second_implementation_and_lies_inside(key, width, height, scale, ratio):
    box = crop_box(*key, width, height, scale, ratio)
    left, top, w, h = box
    assert box == slow_crop_box(*key, width, height, scale, ratio)
    assert all(isinstance(value, int) for value in box)
    assert w >= 1 and h >= 1 and 0 <= left <= width - w and 0 <= top <= height - h


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((2, 3000), (0, 1498, 2, 3)),
        ((3000, 2), (1498, 0, 3, 2)),
        ((1, 65535), (0, 32767, 1, 1)),
    ],
)
def test_crop_box_of_extreme_shapes(size, expected):
    assert crop_box(0, 0, 0, 0, *size, (0.9, 1.0), (3 / 4, 4 / 3)) == expected


def test_crop_box_has_the_statistics_of_random_resized_crop():
    boxes = np.array([crop_box(1, 0, i, 0, 400, 400, (0.2, 0.7), (3 / 4, 4 / 3)) for i in range(4000)])
    left, top, w, h = boxes.T
    assert abs(np.mean(w * h / 160_000) - 0.45) < 0.01  # area is uniform; no try is rejected here
    assert abs(np.mean(np.log(w / h))) < 0.01  # aspect is log-uniform
    assert abs(np.std(np.log(w / h)) - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    for offset, side in ((left, w), (top, h)):
        assert abs(np.mean(offset / (400 - side)) - 0.5) < 0.02


def test_crop_box_depends_on_every_part_of_its_key():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({crop_box(*key, 500, 375, (0.2, 1.0), (3 / 4, 4 / 3)) for key in keys}) == len(keys)


def test_center_box_is_resize_256_then_crop_224():
    assert center_box(500, 400) == (75.0, 25.0, 350.0, 350.0)
    assert center_box(256, 256) == (16.0, 16.0, 224.0, 224.0)
    assert center_box(400, 400, 1.0, aspect=2.0) == (0.0, 100.0, 400.0, 200.0)


def test_substitute_is_another_sample_and_reaches_all():
    assert {substitute(0, 0, 3, attempt, 5) for attempt in range(100)} == {0, 1, 2, 4}
    chosen = [substitute(seed, 1, 7, 0, 1000) for seed in range(2000)]
    assert abs(statistics.fmean(chosen) - 500) < 30
    with pytest.raises(ValueError, match="at least 2"):
        substitute(0, 0, 0, 0, 1)
