"""Block masks: one rectangle after the other in plain Python, the official generator's statistics, exact counts."""

import functools
import math
import random

import fastmim_kernels as fk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

RNG = torch.tensor([17, 4])
# Numbers of the specification of the draws: rounds per mask, tries per round.
ROUNDS, TRIES = 20, 16


def assert_consistent(masks, patches, masked):
    ids_keep, ids_masked, ids_restore, mask = masks
    batch = len(mask)
    shapes = [(batch, patches - masked), (batch, masked), (batch, patches), (batch, patches)]
    assert [tuple(t.shape) for t in masks] == shapes
    assert [t.dtype for t in masks] == [torch.int64] * 3 + [torch.float32]
    for row in range(batch):
        hidden = [i for i in range(patches) if mask[row, i] == 1]
        assert ids_masked[row].tolist() == hidden, "raster order, and exactly the masked ones"
        assert ids_keep[row].tolist() == [i for i in range(patches) if mask[row, i] == 0]
    order = torch.cat([ids_keep, ids_masked], 1)
    assert torch.equal(order.gather(1, ids_restore), torch.arange(patches).expand(batch, -1))


def slow_mask(words, grid, masked, min_block, low, high):
    """(mask as a set of (row, column), patches that no rectangle masked): rectangles one by one, sets of patches."""
    rows, columns = grid
    hidden = set()
    for first in range(0, ROUNDS * TRIES, TRIES):
        for attempt in range(first, first + TRIES):
            missing = masked - len(hidden)
            shape, place = words[2 * attempt : 2 * attempt + 2]
            area = min_block + (missing - min_block) * (shape // 65536 / 65536)
            ratio = math.exp(math.log(low) + (math.log(high) - math.log(low)) * (shape % 65536 / 65536))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h >= rows or w >= columns:
                continue
            top = place // 65536 * (rows - h + 1) // 65536
            left = place % 65536 * (columns - w + 1) // 65536
            box = {(y, x) for y in range(top, top + h) for x in range(left, left + w)}
            if 0 < len(box - hidden) <= missing:
                hidden |= box
                break
    left_over = masked - len(hidden)
    start = words[0] % (rows * columns)
    raster = [divmod((start + i) % (rows * columns), columns) for i in range(rows * columns)]
    free = [cell for cell in raster if cell not in hidden]
    around = {(y, x): sum((y + a, x + b) in hidden for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))) for y, x in free}
    hidden |= set(sorted(free, key=lambda cell: -around[cell])[:left_over])  # sorted() keeps the order of ties
    return hidden, left_over


# (grid, masked, min_block, aspect, whether some masks of 12 must have needed the completion)
CASES = [
    ((14, 14), 98, 16, (0.3, 1 / 0.3), False),
    ((14, 14), 75, 16, (0.3, 1 / 0.3), False),
    ((14, 14), 190, 16, (0.3, 1 / 0.3), True),
    ((4, 4), 8, 1, (0.3, 1 / 0.3), False),
    ((4, 4), 8, 16, (0.3, 1 / 0.3), True),
    ((7, 5), 17, 3, (0.5, 2.0), False),
    ((3, 9), 26, 2, (0.05, 20.0), False),
    ((1, 8), 3, 1, (0.3, 1 / 0.3), True),
    ((2, 2), 2, 1, (1.0, 1.0), False),
    ((1, 2), 1, 16, (0.3, 1 / 0.3), True),
]


@pytest.mark.parametrize(("grid", "masked", "min_block", "aspect", "is_completed"), CASES, ids=range(len(CASES)))
def test_block_masks_equal_one_rectangle_after_the_other(grid, masked, min_block, aspect, is_completed):
    ids = torch.arange(12) * 1_000_003 + 5
    masks = fk.block_masking(RNG, ids, grid, masked, min_block=min_block, aspect=aspect)
    assert_consistent(masks, grid[0] * grid[1], masked)
    words = fk.random_words(RNG, ids, fk.Stream.BLOCK, 2 * ROUNDS * TRIES).tolist()
    left_over = 0
    for row, drawn in zip(masks.mask, words, strict=True):
        hidden, missing = slow_mask(drawn, grid, masked, min_block, *aspect)
        assert {divmod(i, grid[1]) for i in row.nonzero()[:, 0].tolist()} == hidden
        left_over += missing
    assert (left_over > 0) == is_completed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(h=st.integers(1, 9), w=st.integers(1, 9), data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_block_masks_have_the_exact_number_on_any_grid(h, w, data, seed):
    if h * w == 1:
        return
    masked = data.draw(st.integers(1, h * w - 1))
    min_block = data.draw(st.integers(1, 20))
    masks = fk.block_masking(torch.tensor([seed, 3]), torch.arange(4), (h, w), masked, min_block=min_block)
    assert_consistent(masks, h * w, masked)


def official_mask(rnd, rows, columns, masked, min_block):
    """The published generator with Python's random numbers, draw by draw."""
    hidden = [[0] * columns for _ in range(rows)]
    count = 0
    while count != masked:
        missing = masked - count
        area = rnd.uniform(min_block, missing)
        ratio = math.exp(rnd.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < rows and w < columns:
            top, left = rnd.randint(0, rows - h), rnd.randint(0, columns - w)
            inside = sum(sum(row[left : left + w]) for row in hidden[top : top + h])
            if 0 < h * w - inside <= missing:
                for row in hidden[top : top + h]:
                    row[left : left + w] = [1] * w
                count += h * w - inside
    return hidden


@functools.cache
def our_map(count=6000, grid=(14, 14), masked=98, min_block=16):
    """Share of masks that hide each patch, (h, w)."""
    masks = fk.block_masking(RNG, torch.arange(count), grid, masked, min_block=min_block)
    return masks.mask.double().mean(0).view(grid)


@pytest.mark.parametrize(
    ("grid", "masked", "min_block", "count"), [((14, 14), 98, 16, 2500), ((7, 5), 17, 3, 4000), ((4, 4), 8, 1, 4000)]
)
def test_block_masks_hide_every_patch_as_often_as_the_official_generator(grid, masked, min_block, count):
    rnd = random.Random(1)
    official = torch.tensor([official_mask(rnd, *grid, masked, min_block) for _ in range(count)]).double().mean(0)
    ours = our_map(count, grid, masked, min_block)
    deviations = (official - ours) / (2 * official * (1 - official) / count).sqrt()
    assert deviations.abs().max() < 4.5


def test_block_masks_have_the_published_marginal_map():
    """Corner .06, middle of an edge .27, center .86. Standard error at 6000: below .006."""
    share = our_map()
    corners = share[[0, 0, -1, -1], [0, -1, 0, -1]]
    edges = torch.cat([share[0, 6:8], share[-1, 6:8], share[6:8, 0], share[6:8, -1]])
    assert (corners - 0.06).abs().max() < 0.015
    assert (edges - 0.27).abs().max() < 0.025
    assert (share[6:8, 6:8] - 0.86).abs().max() < 0.02
    assert share.mean().item() == pytest.approx(0.5, abs=1e-12)


def test_block_masks_prefer_no_side_and_no_direction():
    share = our_map()
    for other in (share.flip(0), share.flip(1), share.T):
        assert (share - other).abs().max() < 5 * math.sqrt(2 * 0.25 / 6000)
    assert share.min() > 0.03, "the last row and the last column, too"


def test_block_masks_are_blocks():
    """Far more masked patches touch another one than in random masks of the same number."""

    def touching(mask):
        grid = mask.view(-1, 14, 14).bool()
        return (grid[:, 1:] & grid[:, :-1]).double().mean() + (grid[:, :, 1:] & grid[:, :, :-1]).double().mean()

    blocks = touching(fk.block_masking(RNG, torch.arange(200), (14, 14), 98).mask)
    assert blocks > 1.6 * touching(fk.random_masking(RNG, torch.arange(200), 196, 98).mask)


def test_block_masks_depend_on_seed_step_and_id_alone():
    whole = fk.block_masking(RNG, torch.tensor([5, 6, 7]), (14, 14), 98)
    alone = fk.block_masking(RNG, torch.tensor([7]), (14, 14), 98)
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, alone, strict=True))
    rngs = ([17, 4], [17, 5], [18, 4])
    rows = [fk.block_masking(torch.tensor(rng), torch.arange(20), (14, 14), 98).mask for rng in rngs]
    assert len(torch.cat(rows).unique(dim=0)) == 60


def test_block_masks_do_not_use_the_words_of_random_masks():
    drawn = fk.random_words(RNG, torch.arange(3), fk.Stream.MASK, 8)
    assert not (drawn == fk.random_words(RNG, torch.arange(3), fk.Stream.BLOCK, 8)).any()


def test_block_masks_are_the_same_without_the_early_exit(monkeypatch):
    """What runs on a GPU and in torch.compile: all rounds, nothing read on the host."""
    from fastmim_kernels.block_masks import reference

    arguments = [
        (RNG, torch.arange(40), (14, 14), 98),
        (RNG, torch.arange(9), (2, 7), 9),
        (RNG, torch.arange(5), (1, 6), 2),
    ]
    early = [fk.block_masking(*a, min_block=3) for a in arguments]
    monkeypatch.setattr(reference, "is_readable", lambda tensor: False)
    for masks, a in zip(early, arguments, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(masks, fk.block_masking(*a, min_block=3), strict=True))


def test_block_masks_are_the_same_under_autocast():
    plain = fk.block_masking(RNG, torch.arange(8), (30, 31), 500)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fk.block_masking(RNG, torch.arange(8), (30, 31), 500).mask, plain.mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_masked": 0}, "num_masked: expected 1..195, got 0; correct the mask ratio"),
        ({"num_masked": 196}, "num_masked: expected 1..195, got 196"),
        ({"grid": (0, 5)}, "grid: expected at least 1x1 and at most 1048576 patches, got 0x5"),
        ({"min_block": 0}, "min_block: expected at least 1 patch, got 0"),
        ({"aspect": (0.0, 1.0)}, "aspect: expected 1e-6 <= lowest <= highest <= 1e6"),
        ({"aspect": (2.0, 0.5)}, "aspect: expected 1e-6 <= lowest <= highest <= 1e6"),
    ],
    ids=range(6),
)
def test_block_masks_refuse_what_makes_no_mask(change, message):
    named = {"grid": (14, 14), "num_masked": 98, **change}
    with pytest.raises(ValueError, match=message):
        fk.block_masking(RNG, torch.arange(2), **named)
    with pytest.raises(TypeError, match="rng: expected an int64 tensor"):
        fk.block_masking(RNG.float(), torch.arange(2), (14, 14), 98)
