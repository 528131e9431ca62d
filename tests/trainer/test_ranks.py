"""Processes compute what one computes with the same global batch, for every method, and end together on any data."""

from itertools import pairwise

import pytest
import torch
from fastmim_pipelines.loader import CropLoader
from fastmim_pipelines.spec import CropSpec
from trainer_run import TINY, losses, metrics, write_images

from fastmim.methods.base import available

STEPS = 20
CROPS = (CropSpec((2, 2)),)


# What the demo presets leave out: stochastic depth, block masks, the convolutional stem.
MORE = {
    "cae-paper": ["--cae.mask", "block", "--cae.drop-path", "0.1"], "simmim-paper": ["--simmim.drop-path", "0.1"],
    "cmae-conv": ["--stem", "conv", "--patch-size", "8", "--image-size", "32"],
}  # fmt: skip


@pytest.mark.parametrize("case", [*available(), *MORE])
def test_losses_of_two_ranks_are_those_of_one(images, server, tmp_path, case):
    """fp32, from the first step to the last; 20 steps are 5 epochs here, and ICMAE finds new boxes in four of them."""
    # Without labels nothing is evaluated: this is about training.
    method, flags = case.partition("-")[0], MORE.get(case, [])
    common = ["train", "--method", method, "--data", str(images / "train"), *TINY, *flags, "--steps", str(STEPS)]
    curves = []
    for world in (1, 2):
        out = tmp_path / f"ranks-{world}"
        server.run([*common, "--out", str(out)], world=world)
        curves.append(losses(out))
    assert len(curves[0]) == STEPS
    assert all(a != b for a, b in pairwise(curves[0])), "a run that stands still would agree with itself"
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


# -- sizes that nothing divides ----------------------------------------------------------------------------------


class Numbered:
    """An index of images that are their numbers."""

    kind, root, classes, labels = "folder", "numbers", (), None

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        return str(index)

    def encoded(self, indices):
        return list(indices)


class NoReader:
    """Decodes nothing."""

    uses_native, device, reason, threads = False, "cpu", "nothing to decode", 0

    def __init__(self, shapes, in_chans: int):
        self.in_chans = in_chans

    def read(self, encoded, names, boxes_of, tensors):
        return [None] * len(encoded)


@pytest.mark.parametrize("world", range(1, 9))
def test_any_size_gives_every_rank_the_same_steps(world):
    """1 to 257 images: as many batches on each rank, no image twice in an epoch, and those of one process."""
    for count in (1, 2, 7, 8, 9, 31, 64, 65, 127, 256, 257):
        for batch_size in (world, 5 * world):
            if batch_size > count:
                with pytest.raises(
                    ValueError, match=f"expected at most the {count} images of numbers, got {batch_size}"
                ):
                    CropLoader(Numbered(count), CROPS, batch_size=batch_size, world=world, reader_class=NoReader)
                continue
            loaders = [
                CropLoader(Numbered(count), CROPS, batch_size=batch_size, rank=r, world=world, reader_class=NoReader)
                for r in range(world)
            ]
            assert {loader.steps_per_epoch for loader in loaders} == {count // batch_size}
            first = [torch.cat([batch.ids for batch in loader.epoch(3)]) for loader in loaders]
            assert {len(ids) for ids in first} == {count // batch_size * batch_size // world}
            everything = torch.stack([ids.view(-1, batch_size // world) for ids in first], dim=1).flatten()
            assert len(set(everything.tolist())) == len(everything) == count // batch_size * batch_size
            alone = CropLoader(Numbered(count), CROPS, batch_size=batch_size, reader_class=NoReader)
            assert torch.equal(torch.cat([batch.ids for batch in alone.epoch(3)]), everything)


@pytest.mark.parametrize(("count", "world", "batch_size"), [(7, 3, 6), (13, 2, 4), (9, 4, 8)])
def test_ranks_of_uneven_data_end_together(server, tmp_path, count, world, batch_size):
    """k-NN on two images, boxes of shares that differ, a last batch that is left out: no rank waits for another."""
    write_images(tmp_path / "images" / "train", count, classes=1)
    write_images(tmp_path / "images" / "val", 2, classes=1, seed=1)
    out = tmp_path / "run"
    argv = ["train", "--method", "icmae", "--data", str(tmp_path / "images"), *TINY, "--batch-size", str(batch_size),
            "--icmae.head-hidden", "32", "--icmae.head-out", "16", "--icmae.decoder-width", "32", "--epochs", "5",
            "--hang-after", "60", "--out", str(out)]  # fmt: skip
    server.run(argv, world=world)
    assert len(losses(out)) == 5 * (count // batch_size)
    assert len({record["box_area"] for record in metrics(out) if "loss" in record}) > 1, "boxes were looked for"


def test_more_processes_than_images_is_one_line(server, tmp_path):
    write_images(tmp_path / "images", 2, classes=1)
    argv = ["train", "--method", "mae", "--data", str(tmp_path / "images"), *TINY, "--batch-size", "3", "--steps", "2",
            "--out", str(tmp_path / "run")]  # fmt: skip
    said = server.run(argv, world=3, code=2)
    assert said.count("error: ") == 1 and "expected at most the 2 images" in said, said
