"""Mixing: exact shares, the documented order, pixels of the right image, unmixing against loops."""

import fastmim_kernels as fk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

RNG = torch.tensor([17, 4])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def counts(src, members):
    return [torch.bincount(row, minlength=members).tolist() for row in src]


# ---- partition


@settings(max_examples=40, deadline=None, derandomize=True)
@given(patches=st.integers(1, 260), data=st.data(), seed=st.integers(0, 2**63 - 1), sample=st.integers(0, 2**48 - 1))
def test_partition_gives_equal_shares_and_the_remainder_one_by_one(patches, data, seed, sample):
    members = data.draw(st.integers(1, min(patches, 12)))
    src = fk.partition(torch.tensor([seed, 5]), torch.tensor([sample, 3]), patches, members)
    assert src.shape == (2, patches) and src.dtype == torch.int64
    expected = [patches // members + (j < patches % members) for j in range(members)]
    assert counts(src, members) == [expected, expected]


def test_partition_of_196_positions_shows_49_and_hides_147_of_each_of_4_images():
    src = fk.partition(RNG, torch.arange(0, 64, 4), 196, 4)
    assert counts(src, 4) == [[49] * 4] * 16
    mask = (src[:, None] != torch.arange(4)[:, None]).float()
    assert torch.equal(mask.sum(2), torch.full((16, 4), 147.0))
    assert torch.equal((1 - mask).sum(1), torch.ones(16, 196)), "each position is visible in one member"


@pytest.mark.parametrize(("patches", "members"), [(196, 4), (197, 3), (9, 9), (1, 1)])
def test_partition_deals_the_positions_out_in_the_order_of_word_then_index(patches, members):
    ids = torch.arange(100, 106)
    words = fk.random_words(RNG, ids, fk.Stream.MIX, patches).tolist()
    for row, drawn in zip(fk.partition(RNG, ids, patches, members).tolist(), words, strict=True):
        order = sorted(range(patches), key=lambda j: (drawn[j], j))
        for place, position in enumerate(order):
            assert row[position] == place % members


def test_ties_are_dealt_out_by_index(monkeypatch):
    from fastmim_kernels.mixing import reference

    same = torch.full((2, 7), 2**32 - 1)
    monkeypatch.setattr(reference, "random_words", lambda rng, ids, stream, count: same)
    assert fk.partition(RNG, torch.arange(2), 7, 3).tolist() == [[0, 1, 2, 0, 1, 2, 0]] * 2


def test_partition_is_a_function_of_seed_step_and_id():
    ids = torch.arange(20)
    rows = [fk.partition(torch.tensor(rng), ids, 196, 4) for rng in ([1, 1], [1, 2], [2, 1])]
    assert len(torch.cat(rows).unique(dim=0)) == 60
    assert torch.equal(rows[0][7:9], fk.partition(torch.tensor([1, 1]), ids[7:9], 196, 4))


def test_partition_differs_from_the_masks_of_the_same_ids():
    place = fk.random_masking(RNG, torch.arange(4), 196, 49).ids_restore
    assert not torch.equal(place % 4, fk.partition(RNG, torch.arange(4), 196, 4))


def test_every_member_supplies_every_position_equally_often():
    groups = 6000
    src = fk.partition(RNG, torch.arange(groups), 12, 4)
    for position in range(12):
        seen = torch.bincount(src[:, position], minlength=4).double()
        # 16.3 is the 99.9 % quantile of chi-square with 3 degrees of freedom.
        assert ((seen - groups / 4) ** 2 / (groups / 4)).sum() < 16.3


@pytest.mark.parametrize(("patches", "members"), [(196, 4), (197, 3), (10, 5)])
def test_rotated_partitions_use_every_patch_of_every_image_once(patches, members):
    """Full mode: mixture t has (src + t) mod members."""
    src = fk.partition(RNG, torch.arange(3), patches, members)
    for row in src.tolist():
        used = [((s + t) % members, position) for t in range(members) for position, s in enumerate(row)]
        assert sorted(used) == [(j, position) for j in range(members) for position in range(patches)]


# ---- pixels


def slow_mix(images, src, patch, members, size=None, offset=None, flip=None, mean=None, std=None):
    """One value at a time, in Python floats."""
    w = (size or images.shape[2:])[1]
    channels = images.shape[1]
    out = []
    for g, row in enumerate(src.tolist()):
        for position, member in enumerate(row):
            b = g * members + member
            image = images[b].flip(-1) if flip is not None and flip[b] else images[b]
            top, left = (0, 0) if offset is None else offset[b].tolist()
            top, left = top + position // (w // patch) * patch, left + position % (w // patch) * patch
            values = []
            for y in range(top, top + patch):
                for x in range(left, left + patch):
                    for c in range(channels):
                        value = float(image[c, y, x]) / (255 if images.dtype == torch.uint8 else 1)
                        values.append(value if mean is None else (value - mean[c]) / std[c])
            out.append(values)
    return torch.tensor(out, dtype=torch.float64).view(len(src), -1, patch * patch * channels)


def images_of(count, channels, height, width, dtype=torch.uint8):
    g = torch.Generator().manual_seed(count)
    x = torch.randint(0, 256, (count, channels, height, width), generator=g, dtype=torch.uint8)
    return x if dtype == torch.uint8 else (x / 255).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("members", "channels", "image", "size", "patch"),
    [(4, 3, (20, 17), (12, 15), 3), (3, 1, (9, 11), (8, 6), 2), (2, 5, (6, 9), (6, 9), 3), (1, 3, (7, 4), (4, 4), 4)],
)
def test_mix_patches_equals_a_loop_over_pixels(members, channels, image, size, patch, dtype):
    images = images_of(2 * members, channels, *image, dtype)
    patches = (size[0] // patch) * (size[1] // patch)
    src = torch.randint(0, members, (2, patches), generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    named = {
        "size": size,
        "offset": torch.stack([torch.randint(0, a - b + 1, (len(images),), generator=g) for a, b in zip(image, size)], 1),
        "flip": torch.arange(len(images)) % 2 == 0,
        "mean": (0.4, 0.5, 0.45, 0.3, 0.6)[:channels],
        "std": (0.2, 0.25, 0.3, 0.22, 0.27)[:channels],
    }  # fmt: skip
    got = fk.mix_patches(images, src, patch, members, **named)
    assert got.shape == (2, patches, patch * patch * channels) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), slow_mix(images, src, patch, members, **named), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mix_patches_selects_from_the_patches_of_each_image(dtype):
    images = images_of(12, 3, 30, 26)
    named = {"size": (21, 14), "flip": torch.arange(12) % 3 == 0, "offset": torch.tensor([[9, 12], [0, 3]] * 6)}
    named |= {"mean": MEAN, "std": STD, "dtype": dtype}
    src = fk.partition(RNG, torch.arange(4), 6, 3)
    whole = fk.patchify_gather(images, None, 7, **named).view(4, 3, 6, -1)
    expected = whole[torch.arange(4)[:, None], src, torch.arange(6)]
    # Two ops may round a value differently, by one unit of the last place.
    close = {"rtol": 8e-3 if dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}
    torch.testing.assert_close(fk.mix_patches(images, src, 7, 3, **named), expected, **close)


def test_mix_patches_reads_nothing_of_an_image_but_its_positions():
    images = images_of(4, 3, 16, 16)
    src = fk.partition(RNG, torch.arange(2), 16, 2)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    is_used = torch.stack([src == 0, src == 1], 1).view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    spoilt = torch.where(is_used, images, noise)
    assert torch.equal(fk.mix_patches(spoilt, src, 4, 2), fk.mix_patches(images, src, 4, 2))
    assert not torch.equal(fk.mix_patches(noise, src, 4, 2), fk.mix_patches(images, src, 4, 2))


def test_mix_patches_of_strided_images():
    images = images_of(4, 3, 8, 8).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    src = fk.partition(RNG, torch.arange(2), 4, 2)
    assert torch.equal(fk.mix_patches(images, src, 4, 2), fk.mix_patches(images.contiguous(), src, 4, 2))


# ---- tokens


def slow_unmix(tokens, mask_token, position, src, members, num_prefix):
    images = []
    for mixture, row in zip(tokens, src.tolist(), strict=True):
        for member in range(members):
            own = [mixture[i] + position[i] for i in range(num_prefix)]
            for place, owner in enumerate(row, start=num_prefix):
                own.append((mixture[place] if owner == member else mask_token) + position[place])
            images.append(torch.stack(own))
    return torch.stack(images)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize(("patches", "members", "width"), [(196, 4, 64), (197, 3, 100), (49, 2, 1), (1, 1, 7)])
def test_unmix_tokens_equals_a_loop(patches, members, width, num_prefix):
    g = torch.Generator().manual_seed(0)
    tokens, token, position = (
        torch.randn(*shape, generator=g)
        for shape in ((2, num_prefix + patches, width), (width,), (num_prefix + patches, width))
    )
    src = fk.partition(RNG, torch.arange(2), patches, members)
    got = fk.unmix_tokens(tokens, token, position, src, members, num_prefix)
    assert torch.equal(got, slow_unmix(tokens, token, position, src, members, num_prefix))


@pytest.mark.parametrize(("patches", "members"), [(196, 4), (50, 3)])
def test_unmix_undoes_mix_on_the_visible_patches(patches, members):
    """With tokens = pixels: every image holds its own patches where the mixture shows them, and nothing elsewhere."""
    images = images_of(2 * members, 1, patches // 2 * 2, 4)
    src = fk.partition(RNG, torch.arange(2), patches, members)
    mixed = fk.mix_patches(images, src, 2, members, size=(patches // 2 * 2, 4))
    whole = fk.patchify_gather(images, None, 2, size=(patches // 2 * 2, 4))
    got = fk.unmix_tokens(mixed, torch.full((4,), -1.0), torch.zeros(patches, 4), src, members, num_prefix=0)
    is_own = (src[:, None] == torch.arange(members)[:, None]).flatten(0, 1)[:, :, None]
    torch.testing.assert_close(got, torch.where(is_own, whole, -1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_unmix_tokens_gradients(num_prefix):
    leaf = {"dtype": torch.float64, "requires_grad": True}
    length = num_prefix + 7
    tokens, token, position = torch.randn(2, length, 3, **leaf), torch.randn(3, **leaf), torch.randn(length, 3, **leaf)
    src = fk.partition(RNG, torch.arange(2), 7, 3)
    assert torch.autograd.gradcheck(lambda *a: fk.unmix_tokens(*a, src, 3, num_prefix), (tokens, token, position))


def test_unmix_tokens_promotes_and_rounds_once():
    src = fk.partition(RNG, torch.arange(2), 9, 3)
    tokens, token, position = torch.randn(2, 10, 8).bfloat16(), torch.randn(8), torch.randn(10, 8)
    full = fk.unmix_tokens(tokens.float(), token, position, src, 3)
    assert torch.equal(fk.unmix_tokens(tokens, token, position, src, 3), full)
    low = fk.unmix_tokens(tokens, token.bfloat16(), position.bfloat16(), src, 3)
    exact = fk.unmix_tokens(tokens.double(), token.bfloat16().double(), position.bfloat16().double(), src, 3)
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.float().bfloat16())


# ---- wrong arguments

IMAGES, SRC, TOKENS = torch.zeros(4, 3, 4, 4), torch.tensor([[0, 1, 1, 0]] * 2), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fk.partition(RNG, torch.arange(2), 4, 5), ValueError, r"members: expected 1..4, .*, got 5; mix fewer"),
        (lambda: fk.partition(RNG, torch.arange(2), 4, 0), ValueError, r"members: expected 1..4, .*, got 0"),
        (lambda: fk.partition(RNG, torch.arange(2), 0, 1), ValueError, r"num_patches: expected 1..1048576, got 0"),
        (lambda: fk.partition(RNG[:1], torch.arange(2), 4, 2), TypeError, "rng: expected an int64 tensor"),
        (
            lambda: fk.mix_patches(IMAGES[:3], SRC, 2, 2),
            ValueError,
            "images: expected a multiple of members = 2 images",
        ),
        (lambda: fk.mix_patches(IMAGES, SRC[:1], 2, 2), ValueError, r"src: expected shape \(2, 4\), .*, got \(1, 4\)"),
        (lambda: fk.mix_patches(IMAGES, SRC, 4, 2), ValueError, r"src: expected shape \(2, 1\)"),
        (lambda: fk.mix_patches(IMAGES, SRC + 1, 2, 2), IndexError, r"src: expected members in 0..1, got 1..2"),
        (lambda: fk.mix_patches(IMAGES, SRC.int(), 2, 2), TypeError, "src: expected torch.int64"),
        (lambda: fk.mix_patches(IMAGES, SRC, 3, 2), ValueError, "patch_size: expected a divisor"),
        (lambda: fk.mix_patches(IMAGES, SRC, 2, 2, dtype=torch.int8), TypeError, "dtype: expected a floating dtype"),
        (
            lambda: fk.unmix_tokens(TOKENS, torch.zeros(4), torch.zeros(5, 3), SRC, 2),
            ValueError,
            r"mask_token: expected shape \(3,\), got \(4,\)",
        ),
        (
            lambda: fk.unmix_tokens(TOKENS, torch.zeros(3), torch.zeros(4, 3), SRC, 2),
            ValueError,
            r"position: expected shape \(5, 3\), got \(4, 3\)",
        ),
        (
            lambda: fk.unmix_tokens(TOKENS, torch.zeros(3), torch.zeros(5, 3), SRC, 2, 0),
            ValueError,
            r"src: expected shape \(2, 5\)",
        ),
        (
            lambda: fk.unmix_tokens(TOKENS, torch.zeros(3), torch.zeros(5, 3), SRC, 2, 6),
            ValueError,
            "num_prefix: expected 0..5",
        ),
        (
            lambda: fk.unmix_tokens(TOKENS, torch.zeros(3), torch.zeros(5, 3), SRC, 0),
            ValueError,
            "members: expected at least 1, got 0",
        ),
    ],
    ids=range(16),
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
