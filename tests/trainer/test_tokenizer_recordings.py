"""Recorded tokens: equal to computed ones, small, and refused where they do not belong."""

import json

import numpy as np
import pytest
import torch
from dalle_case import pictures, tiny
from fastmim_pipelines.spec import Batch
from slow_reference import draw_flips, model_spec
from torch import nn

from fastmim.config import ConfigError
from fastmim.tokenizer import RecordedTarget, TokenTarget, record_tokens
from fastmim.tokenizer.recorded import checksum
from fastmim.tokenizer.weights import fingerprint

# ---- recordings


class StubLoader:
    """Two epochs' worth of random crops; a sample's crops are functions of (epoch, sample)."""

    steps_per_epoch = 3

    def __init__(self, sizes, batch=4):
        self.sizes, self.batch = sizes, batch

    def epoch(self, epoch, start_step=0):
        order = torch.randperm(3 * self.batch, generator=torch.Generator().manual_seed(epoch))
        for step in range(start_step, 3):
            ids = order[step * self.batch : (step + 1) * self.batch] + 10
            yield Batch(tuple(torch.stack([self.crop(epoch, int(i), s) for i in ids]) for s in self.sizes), ids)

    def crop(self, epoch, sample, size):
        return (pictures(1, 3, *size, seed=1000 * epoch + sample)[0] * 255).to(torch.uint8)


MODEL = model_spec(16, 24, 4)  # a grid of 4 x 6


@pytest.fixture
def recording(tmp_path):
    network = tiny()
    loader = StubLoader([(16, 24), (32, 48)])
    record_tokens(tmp_path / "r", loader, network, MODEL, seed=5, steps=range(2, 7), device=torch.device("cpu"))
    return tmp_path / "r", network, loader


def steps_of(loader, first, last):
    step = 0
    while step < last:
        for batch in loader.epoch(step // 3):
            if first <= step < last:
                yield step, batch
            step += 1


def test_recorded_tokens_equal_computed_ones(recording):
    folder, network, loader = recording
    live, recorded = TokenTarget(network, MODEL), RecordedTarget(folder, MODEL, network)
    assert recorded.vocabulary == 23 and recorded.crops((0.1, 1.0)) == ()
    flipped, tokens = set(), set()
    for step, batch in steps_of(loader, 2, 7):
        rng = torch.tensor([5, step])
        flip = torch.tensor(draw_flips(rng, batch.ids))
        flipped |= set(flip.tolist())
        ids = torch.stack([torch.randperm(24)[:9] for _ in range(4)])
        expected = live(batch, rng, flip, ids)
        assert torch.equal(recorded(batch, rng, flip, ids), expected)
        # Half of a batch in another order, as a rank or a micro-batch has it, without the tokenizer's crop.
        part = [3, 1]
        half = Batch((batch.crops[0][part],), batch.ids[part])
        assert torch.equal(recorded(half, rng, flip[part], ids[part]), expected[part])
        assert torch.equal(recorded(half, rng, flip[part], None).gather(1, ids[part]), expected[part])
        tokens |= set(expected.flatten().tolist())
    assert flipped == {True, False} and len(tokens) > 5, "the case can tell flips and patches apart"


def test_token_target_flips_and_scales_what_the_tokenizer_sees():
    class Spy(nn.Module):
        vocabulary, stride, seen = 5, 3, None

        def forward(self, images, ids=None):
            self.seen = images
            return ids

    network = Spy()
    target = TokenTarget(network, MODEL)
    (crop,) = target.crops((0.08, 0.9))
    assert crop.size == (12, 18) and crop.scale == (0.08, 0.9) and crop.filter == "lanczos" and crop.view == 0
    images = torch.randint(0, 256, (3, 3, 12, 18), dtype=torch.uint8)
    batch = Batch((torch.zeros(3, 3, 16, 24), images), torch.arange(3))
    target(batch, torch.tensor([1, 1]), torch.tensor([True, False, True]), None)
    for i, flip in enumerate([True, False, True]):
        for x in (0, 5, 17):
            column = images[i, :, :, 17 - x if flip else x].float() / 255
            torch.testing.assert_close(network.seen[i, :, :, x], column)


def test_recordings_refuse_what_they_were_not_made_for(recording, tmp_path):
    folder, network, loader = recording
    recorded = RecordedTarget(folder, MODEL)
    (_, batch), (_, later) = steps_of(loader, 2, 4)
    flip = torch.zeros(4, dtype=torch.bool)

    def message(batch, *rng):
        with pytest.raises(ConfigError) as caught:
            recorded(batch, torch.tensor(rng), flip, None)
        return str(caught.value)

    assert "expected seed 6, got 5" in message(batch, 6, 2)
    assert "expected step 1, got a recording of 2..6" in message(batch, 5, 1)
    assert "expected step 7, got a recording of 2..6" in message(batch, 5, 7)
    assert "step 2 was recorded with another id of sample" in message(later, 5, 2)
    other = Batch((batch.crops[0].clone(),), batch.ids)
    other.crops[0][2, 1, 2 + 4 * 3, 2 + 4 * 5] ^= 1
    assert f"another checksum of sample {batch.ids[2]}" in message(other, 5, 2)

    with pytest.raises(ConfigError, match=r"expected grid \[4, 4\], got \[4, 6\]"):
        RecordedTarget(folder, model_spec(16, 16, 4))
    with pytest.raises(ConfigError, match="expected tokenizer"):
        RecordedTarget(folder, MODEL, tiny(seed=1))
    with pytest.raises(ConfigError, match="holds a recording already"):
        record_tokens(folder, loader, network, MODEL, seed=5, steps=range(1), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"expected at least one step to record, got 4\.\.3"):
        record_tokens(tmp_path / "x", loader, network, MODEL, seed=5, steps=range(4, 4), device=torch.device("cpu"))
    (folder / "tokens.json").unlink()
    with pytest.raises(ConfigError, match="expected a finished recording"):
        RecordedTarget(folder, MODEL)
    large = tiny(vocabulary=40000, width=4)
    with pytest.raises(ConfigError, match="vocabulary of at most 32768, got 40000"):
        record_tokens(tmp_path / "x", loader, large, MODEL, seed=5, steps=range(1), device=torch.device("cpu"))


def test_recording_is_small_and_describes_itself(recording):
    folder, network, _ = recording
    description = json.loads((folder / "tokens.json").read_text())
    assert description == {
        "format": "fastmim-tokens-1", "seed": 5, "first_step": 2, "grid": [4, 6], "vocabulary": 23,
        "tokenizer": fingerprint(network),
    }  # fmt: skip
    records = np.load(folder / "tokens.npy", mmap_mode="r")
    assert records.shape == (5, 4) and records.dtype.itemsize == 8 + 8 + 2 * 24


def test_checksum_is_a_polynomial_modulo_2_to_64():
    images = torch.randint(0, 256, (3, 2, 8, 12), dtype=torch.uint8)
    for image, got in zip(images, checksum(images, 4).tolist(), strict=True):
        values = [int(image[c, y, x]) for c in range(2) for y in (2, 6) for x in (2, 6, 10)]
        total = sum(v * pow(6364136223846793005, i + 1, 2**64) for i, v in enumerate(values)) % 2**64
        assert got % 2**64 == total
