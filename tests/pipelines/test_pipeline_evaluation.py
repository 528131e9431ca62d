"""The evaluation reader: center crops in the order of the index, each image once over all ranks."""

import shutil

import numpy as np
import pytest
import torch
from fastmim_pipelines.evaluation import EvalReader, spread
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.spec import DataError
from PIL import Image


def joined(batches: list) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.cat, zip(*batches)))


def test_evaluation_gives_center_crops_in_index_order(demo_set):
    index = FolderIndex(demo_set / "val")
    images, labels, ids = joined(list(EvalReader(index, (32, 32), batch_size=8)))
    assert ids.tolist() == list(range(20)) and labels.tolist() == index.labels.tolist()
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.uint8
    for i in range(20):
        image = Image.open(index.path(i)).convert("RGB")
        side = min(image.size) * 224 / 256
        left, top = (image.width - side) / 2, (image.height - side) / 2
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        assert np.array_equal(images[i].numpy(), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 3}, {"batch_size": 100}], ids=str)
def test_evaluation_does_not_depend_on_workers_or_batches(demo_set, options, children):
    expected = joined(list(EvalReader(demo_set / "val", (16, 24))))
    reader = EvalReader(demo_set / "val", (16, 24), **options)
    for _ in range(2):
        assert all(map(torch.equal, joined(list(reader)), expected))
    assert children() == []


@pytest.mark.parametrize(("world", "limit"), [(2, None), (3, None), (3, 7), (8, 5)])
def test_evaluation_ranks_share_all_images_once(demo_set, world, limit):
    ids = [
        reader.ids.tolist()
        for reader in (EvalReader(demo_set / "val", (8, 8), rank=r, world=world, limit=limit) for r in range(world))
    ]
    assert [i for part in ids for i in part] == spread(20, limit).tolist()
    assert max(map(len, ids)) - min(map(len, ids)) <= 1


def test_evaluation_of_a_rank_without_images_is_empty(demo_set):
    assert list(EvalReader(demo_set / "val", (8, 8), rank=3, world=4, limit=3, workers=2)) == []


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(10, None, range(10)), (10, 20, range(10)), (10, 5, (0, 2, 4, 6, 8)), (10, 3, (0, 3, 6)), (1, 1, (0,))],
)
def test_evaluation_limit_is_spread_evenly(count, limit, expected):
    assert spread(count, limit).tolist() == list(expected)


def test_evaluation_of_unlabeled_images_gives_minus_one(demo_set):
    labels = joined(list(EvalReader(demo_set / "val" / "ring-maze", (8, 8))))[1]
    assert labels.tolist() == [-1, -1]


def test_evaluation_stops_at_or_leaves_out_bad_images(demo_set, tmp_path, children):
    shutil.copytree(demo_set / "val", tmp_path / "val")
    index = FolderIndex(tmp_path / "val")
    with open(index.path(7), "wb"):
        pass
    with pytest.raises(DataError, match=r"the file is empty \(sample 7\); .*skip"):
        list(EvalReader(index, (8, 8), workers=1))
    reader = EvalReader(index, (8, 8), batch_size=1, on_bad_image="skip")
    assert joined(list(reader))[2].tolist() == [i for i in range(20) if i != 7]
    assert reader.bad_images == [(index.path(7), "the file is empty")]
    assert children() == []


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"batch_size": 0}, {"rank": 1}, {"in_chans": 0}], ids=str)
def test_evaluation_checks_its_arguments(demo_set, wrong):
    with pytest.raises(ValueError, match="expected"):
        EvalReader(demo_set / "val", (8, 8), **wrong)
