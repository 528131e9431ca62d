"""Masks: exact counts, permutations, the documented order, uniform draws."""

import fastmim_kernels as fk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

RNG = torch.tensor([17, 4])


def assert_consistent(masks, patches, keep):
    ids_keep, ids_masked, ids_restore, mask = masks
    batch = len(ids_restore)
    assert [tuple(t.shape) for t in masks] == [
        (batch, keep),
        (batch, patches - keep),
        (batch, patches),
        (batch, patches),
    ]
    assert [t.dtype for t in masks] == [torch.int64] * 3 + [torch.float32]
    order = torch.cat([ids_keep, ids_masked], 1)
    raster = torch.arange(patches).expand(batch, -1)
    assert torch.equal(order.sort(1).values, raster)
    assert torch.equal(order.gather(1, ids_restore), raster)
    assert torch.equal(mask.sum(1), torch.full((batch,), float(patches - keep)))
    assert not mask.gather(1, ids_keep).any() and mask.gather(1, ids_masked).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(patches=st.integers(1, 260), data=st.data(), seed=st.integers(0, 2**63 - 1), sample=st.integers(0, 2**48 - 3))
def test_random_masking_is_a_permutation_with_exact_counts(patches, data, seed, sample):
    keep = data.draw(st.integers(1, patches))
    masks = fk.random_masking(torch.tensor([seed, 5]), torch.arange(sample, sample + 2), patches, keep)
    assert_consistent(masks, patches, keep)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(h=st.integers(1, 7), w=st.integers(1, 7), cell=st.integers(1, 3), data=st.data())
def test_cell_masking_keeps_whole_cells(h, w, cell, data):
    keep = data.draw(st.integers(1, h * w))
    grid = (h * cell, w * cell)
    masks = fk.cell_masking(RNG, torch.arange(3), grid, cell, keep)
    assert_consistent(masks, grid[0] * grid[1], keep * cell * cell)
    cells = masks.mask.view(3, h, cell, w, cell).transpose(2, 3).reshape(3, h, w, cell * cell)
    assert torch.equal(cells.amin(-1), cells.amax(-1))


@pytest.mark.parametrize("patches", [1, 49, 196, 197])
def test_random_masking_sorts_by_word_then_index(patches):
    ids = torch.arange(100, 106)
    words = fk.random_words(RNG, ids, fk.Stream.MASK, patches).tolist()
    masks = fk.random_masking(RNG, ids, patches, patches)
    for row, drawn in zip(masks.ids_keep.tolist(), words, strict=True):
        assert row == sorted(range(patches), key=lambda j: (drawn[j], j))


def test_ties_keep_the_lower_index(monkeypatch):
    from fastmim_kernels.masks import reference

    # No seed that gives two equal words is known: only the reference's words can be replaced.
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")
    monkeypatch.setattr(
        reference, "random_words", lambda rng, ids, stream, count: torch.full((len(ids), count), 2**32 - 1)
    )
    assert fk.random_masking(RNG, torch.arange(2), 30, 30).ids_keep.tolist() == [list(range(30))] * 2


def test_cell_masking_lists_patches_cell_by_cell():
    order = fk.random_masking(RNG, torch.arange(4), 12, 12).ids_keep.tolist()
    masks = fk.cell_masking(RNG, torch.arange(4), (6, 8), 2, 5)
    got = torch.cat([masks.ids_keep, masks.ids_masked], 1).tolist()
    for row, cells in zip(got, order, strict=True):
        assert row == [(c // 4 * 2 + dy) * 8 + c % 4 * 2 + dx for c in cells for dy in (0, 1) for dx in (0, 1)]


def test_cell_of_one_patch_equals_random_masking():
    ids = torch.arange(5)
    for a, b in zip(fk.cell_masking(RNG, ids, (14, 14), 1, 49), fk.random_masking(RNG, ids, 196, 49), strict=True):
        assert torch.equal(a, b)


def test_cmae_mask_has_68_visible_patches():
    masks = fk.cell_masking(RNG, torch.arange(8), (14, 14), 2, int(49 * 0.35))
    assert masks.ids_keep.shape == (8, 68) and torch.equal(masks.mask.sum(1), torch.full((8,), 128.0))


def test_samples_steps_and_seeds_get_different_masks():
    rows = [
        fk.random_masking(torch.tensor(rng), torch.arange(20), 196, 49).ids_restore for rng in ([1, 1], [1, 2], [2, 1])
    ]
    assert len(torch.cat(rows).unique(dim=0)) == 60
    assert torch.equal(rows[0], fk.random_masking(torch.tensor([1, 1]), torch.arange(20), 196, 49).ids_restore)


def test_every_patch_is_kept_equally_often_at_every_place():
    batch, patches, keep = 6000, 12, 4
    masks = fk.random_masking(RNG, torch.arange(batch), patches, keep)
    for place in range(keep):
        counts = torch.bincount(masks.ids_keep[:, place], minlength=patches).double()
        expected = batch / patches
        # 31.3 is the 99.9 % quantile of chi-square with 11 degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < 31.3


@pytest.mark.parametrize("keep", [0, 197, -1])
def test_random_masking_refuses_counts_out_of_range(keep):
    with pytest.raises(ValueError, match=rf"num_keep: expected 1..196, got {keep}; correct the mask ratio"):
        fk.random_masking(RNG, torch.arange(2), 196, keep)


def test_cell_masking_refuses_a_cell_that_does_not_divide():
    with pytest.raises(ValueError, match=r"cell: expected a divisor of the grid 14x14, got 4"):
        fk.cell_masking(RNG, torch.arange(2), (14, 14), 4, 3)
    with pytest.raises(ValueError, match=r"num_keep_cells: expected 1..49, got 50"):
        fk.cell_masking(RNG, torch.arange(2), (14, 14), 2, 50)
    with pytest.raises(ValueError, match=r"num_patches: expected 1..1048576"):
        fk.random_masking(RNG, torch.arange(1), 0, 1)
