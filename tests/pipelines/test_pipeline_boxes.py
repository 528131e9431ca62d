"""Crops centered inside boxes: the sampling against a second implementation, and loaders that never mix old and new."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.sampling import beta_quantile, crop_box, substitute
from fastmim_pipelines.spec import Batch, CropSpec, Loader, check_boxes, check_crops
from fastmim_pipelines.synthetic import SyntheticLoader
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

WHOLE = (0.0, 0.0, 1.0, 1.0)
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
# Two views with boxes and a plain one; the third shares the box of the second at another size.
CROPS = (
    CropSpec((24, 24), alpha=0.3, uses_boxes=True),
    CropSpec((16, 24), view=1, alpha=0.1, uses_boxes=True),
    CropSpec((32, 16), view=1, alpha=0.1, uses_boxes=True),
    CropSpec((16, 16), view=2),
)


# ---- the distribution


def slow_beta_cdf(x: float, alpha: float) -> float:
    """The continued fraction of the incomplete beta function (Abramowitz and Stegun 26.5.8), by plain recursion."""
    if x == 0:
        return 0.0
    if x > 0.5:
        return 1 - slow_beta_cdf(1 - x, alpha)
    fraction = 1.0
    for m in range(60, 0, -1):
        half = m // 2
        if m % 2:
            d = -(alpha + half) * (2 * alpha + half) * x / ((alpha + 2 * half) * (alpha + 2 * half + 1))
        else:
            d = half * (alpha - half) * x / ((alpha + 2 * half - 1) * (alpha + 2 * half))
        fraction = 1 + d / fraction
    log_beta = 2 * math.lgamma(alpha) - math.lgamma(2 * alpha)
    return math.exp(alpha * math.log(x) + alpha * math.log1p(-x) - log_beta) / alpha / fraction


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.37, 0.6, 0.95])
def test_beta_quantile_inverts_the_distribution_function(alpha):
    for probability in np.linspace(0.001, 0.999, 499).tolist():
        x = beta_quantile(probability, alpha)
        # Above 1 - 1e-12 the distance to 1 has no digits left.
        if 0 < x < 1 - 1e-12:
            assert slow_beta_cdf(x, alpha) == pytest.approx(probability, abs=2e-6)
        else:
            assert slow_beta_cdf(1e-12, alpha) > min(probability, 1 - probability)


@given(alpha=st.floats(0.01, 1), u=st.floats(0, 1, exclude_max=True), v=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_beta_quantile_is_monotone_symmetric_and_inside(alpha, u, v):
    a, b = beta_quantile(min(u, v), alpha), beta_quantile(max(u, v), alpha)
    assert 0 <= a <= b <= 1
    assert beta_quantile(0.0, alpha) == 0 and beta_quantile(0.5, alpha) == pytest.approx(0.5, abs=1e-12)
    mirrored = 1 - (1 - u)  # what the subtraction leaves of u
    assert beta_quantile(1 - u, alpha) == pytest.approx(1 - beta_quantile(mirrored, alpha), abs=1e-9)


def test_beta_quantile_of_alpha_1_is_the_identity():
    for u in (0.0, 0.1, 1 / 3, 0.5, 0.999, 1 - 2**-53):
        assert beta_quantile(u, 1.0) == u


# ---- the crop


def test_unit_box_and_alpha_1_are_the_plain_crop_but_for_its_last_offset():
    for sample_id in range(2000):
        key = (3, 1, sample_id, 0, 100, 80, SCALE, RATIO)
        plain, boxed = crop_box(*key), crop_box(*key, WHOLE, 1.0)
        assert plain[2:] == boxed[2:]
        for axis, side in ((0, 100), (1, 80)):
            span = side - boxed[2 + axis]
            # floor(span x u) for floor((span + 1) x u): the same number or one less, and never the span itself.
            assert boxed[axis] in (plain[axis], plain[axis] - 1)
            assert boxed[axis] < max(span, 1)


@pytest.mark.parametrize(
    ("alpha", "deviation", "middle"), [(0.1, 0.457, 0.096), (0.6, 0.337, 0.374), (1.0, 0.289, 0.5)]
)
def test_small_alpha_prefers_the_border_of_the_box(alpha, deviation, middle):
    """The shares of the middle half are those of Beta(alpha, alpha); a fixed size keeps the offsets comparable."""
    boxes = np.array([crop_box(0, 0, i, 0, 5000, 5000, (0.25, 0.25), (1, 1), WHOLE, alpha) for i in range(6000)])
    places = boxes[:, :2].ravel() / 2500
    assert places.std() == pytest.approx(deviation, abs=0.006)
    assert np.mean((places > 0.25) & (places < 0.75)) == pytest.approx(middle, abs=0.015)
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.05, "the axes are independent"


def slow_offsets(u: float, low: float, high: float, side: int, box_side: int, alpha: float) -> tuple[int, int, int]:
    """(smallest, expected, largest) offset by the published rule; the quantile by bisection."""
    ends = []
    for edge in (low, high):
        offset = math.floor(side * edge) - box_side // 2
        ends.append(0 if offset < 0 else side - box_side if offset > side - box_side else offset)
    lower, upper = 0.0, 1.0
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if slow_beta_cdf(middle, alpha) < u else (lower, middle)
    return ends[0], ends[0] + math.floor((ends[1] - ends[0]) * (lower + upper) / 2), ends[1]


sides = st.integers(4, 700)
shares = st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)).map(lambda pair: tuple(sorted(pair)))


@given(width=sides, height=sides, sample=st.integers(0, 10**6), rows=shares, columns=shares, alpha=st.floats(0.05, 1))
@settings(max_examples=150, deadline=None)
def test_crop_is_inside_the_image_and_its_center_inside_the_box(width, height, sample, rows, columns, alpha):
    around = (rows[0], columns[0], rows[1], columns[1])
    key = (1, 2, sample, 1, width, height, SCALE, RATIO)
    left, top, w, h = crop_box(*key, around, alpha)
    plain = crop_box(*key)
    assert (w, h) == plain[2:]
    assert 0 <= left <= width - w and 0 <= top <= height - h
    # Ten failed tries: the central box, whatever was asked for.
    assume(crop_box(*key, (0.0,) * 4) != crop_box(*key, (1.0,) * 4) or (w, h) == (width, height))
    for offset, side, box_side, (low, high) in ((left, width, w, columns), (top, height, h, rows)):
        first, last = int(side * low), int(side * high)
        center = offset + box_side // 2
        if first >= box_side // 2 and last - box_side // 2 <= side - box_side:
            assert first <= center <= last
        else:  # as near as the border of the image allows
            assert min(max(first, box_side // 2), side - box_side + box_side // 2) <= center
            assert center <= min(max(last, box_side // 2), side - box_side + box_side // 2)


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_crop_equals_a_second_implementation(alpha):
    around, compared = (0.125, 0.25, 0.625, 0.9375), 0
    for sample in range(150):
        words = np.random.Philox(key=(0x63726F70 << 64) | 7, counter=(5 << 128) | (sample << 64)).random_raw(4)
        left, top, w, h = crop_box(7, 5, sample, 0, 640, 480, SCALE, RATIO, around, alpha)
        u = [int(word) / 2**64 for word in words]
        aspect = math.exp((2 * u[1] - 1) * math.log(4 / 3))
        area = 640 * 480 * (0.2 + 0.8 * u[0])
        if round(math.sqrt(area * aspect)) > 640 or round(math.sqrt(area / aspect)) > 480:
            continue  # the first try failed; the others follow the same rule
        compared += 1
        assert (w, h) == (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)))
        for offset, share, ends, side, box_side in (
            (left, u[2], (0.25, 0.9375), 640, w), (top, u[3], (0.125, 0.625), 480, h)
        ):  # fmt: skip
            first, expected, last = slow_offsets(share, *ends, side, box_side, alpha)
            assert first <= offset <= last and abs(offset - expected) <= 1
    assert compared > 100


def test_crop_falls_back_to_the_central_box():
    for around in (None, (0.0, 0.0, 0.1, 0.1)):
        assert crop_box(0, 0, 0, 0, 2, 3000, (0.9, 1.0), RATIO, around, 0.1) == (0, 1498, 2, 3)


# ---- what is asked for


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ([CropSpec((8, 8), alpha=0.0)], "CropSpec.alpha: expected 0 < alpha <= 1, got 0.0"),
        ([CropSpec((8, 8), alpha=2.0)], "CropSpec.alpha: expected 0 < alpha <= 1, got 2.0"),
        ([CropSpec((8, 8), filter="nearest")], "CropSpec.filter: expected one of bicubic, lanczos, got 'nearest'"),
        ([CropSpec((8, 8)), CropSpec((8, 8), alpha=0.5)], "one alpha, got 1.0 and 0.5"),
        ([CropSpec((8, 8)), CropSpec((8, 8), uses_boxes=True)], "one uses_boxes, got False and True"),
    ],
)
def test_crop_specs_are_checked(crops, message):
    with pytest.raises(ValueError, match=message):
        check_crops(crops, 3)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.zeros((3, 4)), r"boxes: expected shape \(2, 4\), one row per image, got \(3, 4\)"),
        ([[0, 0, 1, 1], [0.5, 0, 0.25, 1]], "in order, got .* for sample 1"),
        ([[0, 0, 1, 1.5], [0, 0, 1, 1]], "for sample 0"),
        ([[0, 0, 1, 1], [0, -0.1, 1, 1]], "for sample 1"),
        ([[0, 0, float("nan"), 1], [0, 0, 1, 1]], "for sample 0"),
    ],
)
def test_boxes_are_checked(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_boxes(np.array(boxes), 2)


def test_synthetic_loader_checks_boxes_and_goes_on():
    loader = SyntheticLoader(CROPS, batch_size=2, count=6)
    before = next(loader.epoch(0))
    loader.set_boxes(random_boxes(6))
    loader.set_boxes(None)
    assert torch.equal(next(loader.epoch(0)).crops[0], before.crops[0])
    with pytest.raises(ValueError, match="one row per image"):
        loader.set_boxes(random_boxes(5))


# ---- the loader


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.random((2, count, 2), dtype=np.float32), axis=0)
    return np.concatenate(ends, axis=1)


@pytest.fixture
def loader_of(request, demo_set):
    """Builds loaders and closes them when the test ends."""

    def build(folder=demo_set / "train", crops=CROPS, **options) -> FolderLoader:
        loader = FolderLoader(folder, crops, **{"batch_size": 8, **options})
        request.addfinalizer(loader.close)
        return loader

    return build


def take(loader: Loader, epoch: int = 0, start_step: int = 0, count: int = 10**9) -> list[Batch]:
    return [batch for _, batch in zip(range(count), loader.epoch(epoch, start_step))]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def differ(left: list[Batch], right: list[Batch]) -> list[bool]:
    """Per crop: whether any batch has other pixels."""
    return [any(not torch.equal(a.crops[i], b.crops[i]) for a, b in zip(left, right)) for i in range(len(CROPS))]


def test_folder_pixels_are_of_the_crop_around_the_sample_s_box(demo_set, loader_of):
    boxes, loader = random_boxes(60), loader_of(seed=5)
    loader.set_boxes(boxes)
    index = FolderIndex(demo_set / "train")
    (batch,) = take(loader, 3, count=1)
    for slot, sample_id in enumerate(batch.ids.tolist()):
        image = Image.open(index.path(sample_id)).convert("RGB")
        for crop, spec in zip(batch.crops, CROPS):
            around = tuple(map(float, boxes[sample_id])) if spec.uses_boxes else None
            left, top, w, h = crop_box(5, 3, sample_id, spec.view, *image.size, SCALE, RATIO, around, spec.alpha)
            expected = image.resize(spec.size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
            assert np.array_equal(crop[slot].numpy(), np.asarray(expected).transpose(2, 0, 1))


def test_an_image_in_place_of_a_bad_one_is_cut_around_its_own_box(demo_set, loader_of, tmp_path):
    data = tmp_path / "train"
    shutil.copytree(demo_set / "train", data)
    index, boxes, bad = FolderIndex(data), random_boxes(60), 17
    Path(index.path(bad)).write_bytes(b"no image")
    loader = loader_of(data, seed=5, on_bad_image="skip")
    loader.set_boxes(boxes)
    (batch,) = [batch for batch in take(loader, 3) if bad in batch.ids]
    chosen = substitute(5, 3, bad, 0, 60)
    image, slot = Image.open(index.path(chosen)).convert("RGB"), batch.ids.tolist().index(bad)
    for crop, spec in zip(batch.crops, CROPS):
        around = tuple(map(float, boxes[chosen])) if spec.uses_boxes else None
        left, top, w, h = crop_box(5, 3, bad, spec.view, *image.size, SCALE, RATIO, around, spec.alpha)
        expected = image.resize(spec.size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        assert np.array_equal(crop[slot].numpy(), np.asarray(expected).transpose(2, 0, 1))


def test_folder_without_boxes_cuts_plain_crops(loader_of):
    plain = tuple(spec._replace(uses_boxes=False, alpha=1.0) for spec in CROPS)
    expected = take(loader_of(crops=plain), count=2)
    loader = loader_of()
    assert_same(take(loader, count=2), expected)
    loader.set_boxes(random_boxes(60))
    assert differ(take(loader, count=2), expected) == [True, True, True, False]
    loader.set_boxes(None)
    assert_same(take(loader, count=2), expected)


@pytest.mark.parametrize("workers, threads", [(0, None), (1, None), (2, None), (0, 3)])
def test_folder_new_boxes_hold_from_the_next_epoch_call_on(loader_of, workers, threads):
    """Workers and threads are then ahead by several batches of the next epoch, cut with the old boxes."""
    old, new = random_boxes(60), random_boxes(60, seed=1)
    references = []
    for boxes, epochs in ((old, (0, 1)), (new, (1, 2))):
        fresh = loader_of()
        fresh.set_boxes(boxes)
        references.append([take(fresh, epoch) for epoch in epochs])
    loader = loader_of(workers=workers, threads=threads)
    loader.set_boxes(old)
    assert_same(take(loader, 0), references[0][0])
    loader.set_boxes(new)
    after = take(loader, 1)
    assert_same(after, references[1][0])
    assert differ(after, references[0][1]) == [True, True, True, False], "the case can tell old from new"
    assert_same(take(loader, 2, 3), references[1][1][3:])


@pytest.mark.parametrize("workers, threads", [(0, None), (2, None), (0, 3)])
def test_folder_new_boxes_end_iterators_with_old_ones(loader_of, workers, threads, children):
    loader = loader_of(workers=workers, threads=threads)
    running = loader.epoch(0)
    first = next(running)
    loader.set_boxes(random_boxes(60))
    assert children() == []
    with pytest.raises(RuntimeError, match="use the newest iterator only"):
        next(running)
    again = next(loader.epoch(0))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.crops[0], again.crops[0])


@pytest.mark.parametrize("workers, threads", [(0, None), (1, None), (2, None), (0, 3)])
def test_folder_with_boxes_resumes_at_any_step(loader_of, workers, threads):
    straight = loader_of()
    straight.set_boxes(random_boxes(60))
    whole = take(straight, 1)
    loader = loader_of(workers=workers, threads=threads)
    loader.set_boxes(random_boxes(60))
    assert_same(take(loader, 1, 4), whole[4:])


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_folder_boxes_reach_workers_that_are_not_forked(loader_of, monkeypatch, method):
    alone = loader_of()
    alone.set_boxes(random_boxes(60))
    monkeypatch.setattr("fastmim_pipelines.workers.start_method", lambda: method)
    loader = loader_of(workers=1)
    loader.set_boxes(random_boxes(60))
    assert_same(take(loader, count=2), take(alone, count=2))


def test_folder_boxes_of_ranks_make_up_the_global_batch(loader_of):
    loaders = [loader_of(), *(loader_of(rank=rank, world=2) for rank in range(2))]
    for loader in loaders:
        loader.set_boxes(random_boxes(60))
    whole, *parts = (take(loader, count=2) for loader in loaders)
    for step, batch in enumerate(whole):
        for i, crop in enumerate(batch.crops):
            assert torch.equal(crop, torch.cat([part[step].crops[i] for part in parts]))


def test_folder_keeps_boxes_that_their_owner_changes_later(loader_of):
    boxes, loader, other = random_boxes(60), loader_of(), loader_of()
    other.set_boxes(boxes)
    expected = take(other, count=2)
    loader.set_boxes(boxes)
    boxes[:] = WHOLE
    assert_same(take(loader, count=2), expected)


def test_folder_refuses_boxes_of_another_folder_and_keeps_the_old(loader_of):
    loader = loader_of()
    loader.set_boxes(random_boxes(60))
    expected = take(loader, count=1)
    with pytest.raises(ValueError, match=r"boxes: expected shape \(60, 4\)"):
        loader.set_boxes(random_boxes(61))
    assert_same(take(loader, count=1), expected)


def test_folder_resizes_by_the_filter_asked_for(demo_set, loader_of):
    crops = (CropSpec((16, 20), filter="lanczos"), CropSpec((16, 20)))
    (batch,) = take(loader_of(crops=crops), count=1)
    index, sample_id = FolderIndex(demo_set / "train"), int(batch.ids[0])
    image = Image.open(index.path(sample_id)).convert("RGB")
    left, top, w, h = crop_box(0, 0, sample_id, 0, *image.size, SCALE, RATIO)
    for crop, resample in zip(batch.crops, (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)):
        expected = np.asarray(image.resize((20, 16), resample, (left, top, left + w, top + h)))
        assert np.array_equal(crop[0].numpy(), expected.transpose(2, 0, 1))


def test_evaluation_gives_whole_images_without_their_aspect(demo_set):
    index = FolderIndex(demo_set / "val")
    ((images, _, ids),) = list(EvalReader(index, (24, 40), size_ratio=None))
    assert ids.tolist() == list(range(20))
    for i in range(20):
        whole = Image.open(index.path(i)).convert("RGB").resize((40, 24), Image.Resampling.BICUBIC)
        assert np.array_equal(images[i].numpy(), np.asarray(whole).transpose(2, 0, 1))
