"""Philox4x32-10 against its published vectors and against Python integers."""

import fastmim_kernels as fk
import pytest
import torch
from fastmim_kernels.philox.reference import philox4x32

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def slow_philox(counter, key):
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def slow_words(seed, step, sample, stream, count):
    low = 2**32 - 1
    return [
        slow_philox(
            [i // 4, sample & low, step & low, stream | (sample >> 32 & 0xFFFF) << 16], [seed & low, seed >> 32 & low]
        )[i % 4]
        for i in range(count)
    ]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_vectors(counter, key, result):
    assert slow_philox(words(counter), words(key)) == words(result)
    got = philox4x32(tuple(torch.tensor(words(counter)).unbind()), tuple(torch.tensor(words(key)).unbind()))
    assert [int(word) for word in got] == words(result)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1], ids=hex)
@pytest.mark.parametrize("step", [0, 3, 2**32 - 1, 2**40 + 5])
def test_random_words_equal_python_integers(seed, step):
    ids = [0, 1, 2**31, 2**32 - 1, 2**32, 2**47 + 12345, 2**48 - 1]
    for stream, count in ((fk.Stream.MASK, 9), (fk.Stream.MIX, 1), (0xFFFF, 4)):
        got = fk.random_words(torch.tensor([seed, step]), torch.tensor(ids), stream, count)
        assert got.tolist() == [slow_words(seed, step, sample, stream, count) for sample in ids]


def test_uniform_is_the_top_24_bits():
    rng, ids = torch.tensor([5, 6]), torch.arange(50)
    u = fk.uniform(rng, ids, fk.Stream.SHIFT, 21)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    assert torch.equal((u.double() * 2**24).long(), fk.random_words(rng, ids, fk.Stream.SHIFT, 21) >> 8)


def test_longer_draws_begin_with_shorter_ones():
    rng, ids = torch.tensor([5, 6]), torch.arange(3)
    assert torch.equal(fk.uniform(rng, ids, 0, 10)[:, :3], fk.uniform(rng, ids, 0, 3))


def test_draw_of_a_sample_does_not_depend_on_its_batch():
    rng, ids = torch.tensor([5, 6]), torch.arange(40, 60)
    assert torch.equal(fk.uniform(rng, ids, 1, 7)[11:13], fk.uniform(rng, ids[11:13], 1, 7))
    assert torch.equal(fk.uniform(rng, ids, 1, 7)[::3], fk.uniform(rng, ids[::3], 1, 7))


def test_seed_step_sample_and_stream_change_everything():
    draws = [
        fk.random_words(torch.tensor([seed, step]), torch.tensor([sample]), stream, 64)
        for seed, step, sample, stream in (
            (1, 1, 1, 1),
            (2, 1, 1, 1),
            (1, 2, 1, 1),
            (1, 1, 2, 1),
            (1, 1, 1, 2),
            (1 + 2**32, 1, 1, 1),
        )
    ]
    values = torch.cat(draws).flatten()
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("axis", ["words", "samples", "steps"])
def test_uniform_fills_16_bins_evenly(axis):
    ids = torch.arange(40_000 if axis == "samples" else 1)
    if axis == "steps":
        u = torch.cat([fk.uniform(torch.tensor([3, step]), ids, fk.Stream.FLIP, 8) for step in range(2000)])
    else:
        u = fk.uniform(torch.tensor([3, 9]), ids, fk.Stream.FLIP, 40_000 if axis == "words" else 1)
    counts = torch.histc(u, 16, 0, 1)
    expected = u.numel() / 16
    # 37.7 is the 99.9 % quantile of chi-square with 15 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rng": torch.tensor([1])}, TypeError, "rng: expected an int64 tensor"),
        ({"rng": torch.tensor([1.0, 2.0])}, TypeError, "rng: expected an int64 tensor"),
        ({"rng": (1, 2)}, TypeError, "rng: expected an int64 tensor .* got tuple"),
        ({"ids": torch.tensor([[1]])}, ValueError, r"ids: expected shape \(B,\)"),
        ({"ids": torch.tensor([1.0])}, TypeError, "ids: expected torch.int64"),
        ({"stream": 65536}, ValueError, "stream: expected 0..65535, got 65536"),
        ({"count": -1}, ValueError, "count: expected 0..2"),
        (
            {"rng": torch.empty(2, dtype=torch.int64, device="meta")},
            ValueError,
            "rng: expected a tensor on cpu like ids, got meta",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_raise(change, error, message):
    arguments = {"rng": torch.tensor([1, 2]), "ids": torch.tensor([1]), "stream": 0, "count": 3, **change}
    for function in (fk.uniform, fk.random_words):
        with pytest.raises(error, match=message):
            function(**arguments)
