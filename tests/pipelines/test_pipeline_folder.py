"""The folder loader: the same pixels for any workers, ranks and starting point, and bad images dealt with as agreed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.sampling import crop_box, permute, substitute
from fastmim_pipelines.spec import CropSpec, DataError, Loader
from PIL import Image

CROPS = (CropSpec((32, 32)), CropSpec((16, 24)), CropSpec((24, 24), scale=(0.05, 0.4), view=1))


@pytest.fixture
def loader_of(request):
    """Builds loaders and closes them when the test ends."""

    def build(folder, crops=CROPS, **options) -> FolderLoader:
        loader = FolderLoader(folder, crops, **{"batch_size": 8, **options})
        request.addfinalizer(loader.close)
        return loader

    return build


def take(loader: Loader, epoch: int = 0, start_step: int = 0, count: int | None = None) -> list:
    return [batch for _, batch in zip(range(count or 10**9), loader.epoch(epoch, start_step))]


def assert_same(left: list, right: list) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert torch.equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


def test_folder_batches_have_the_shapes_asked_for(demo_set, loader_of):
    loader = loader_of(demo_set / "train")
    assert loader.steps_per_epoch == 60 // 8
    batches = take(loader)
    assert len(batches) == 7
    for batch in batches:
        assert [tuple(crop.shape) for crop in batch.crops] == [(8, 3, 32, 32), (8, 3, 16, 24), (8, 3, 24, 24)]
        assert all(crop.dtype == torch.uint8 and crop.is_contiguous() for crop in batch.crops)
        assert batch.ids.dtype == torch.int64 and batch.ids.shape == (8,)


def test_folder_pixels_are_pillows_resize_of_the_sampled_box(demo_set, loader_of):
    index = FolderIndex(demo_set / "train")
    for step, batch in enumerate(take(loader_of(index, seed=5), epoch=3, count=2)):
        assert batch.ids.tolist() == permute(5, 3, 60, np.arange(8) + 8 * step).tolist()
        for slot, sample_id in enumerate(batch.ids.tolist()):
            image = Image.open(index.path(sample_id)).convert("RGB")
            for crop, spec in zip(batch.crops, CROPS):
                left, top, w, h = crop_box(5, 3, sample_id, spec.view, *image.size, spec.scale, spec.ratio)
                expected = image.resize(spec.size[::-1], Image.Resampling.BICUBIC, (left, top, left + w, top + h))
                assert np.array_equal(crop[slot].numpy(), np.asarray(expected).transpose(2, 0, 1))


def test_folder_of_photographs_is_read(photographs, loader_of):
    batches = take(loader_of(photographs / "photos", (CropSpec((224, 224)),), batch_size=16, workers=1))
    assert len(batches) == 3 and all(batch.crops[0].float().std() > 20 for batch in batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_folder_batches_do_not_depend_on_workers(demo_set, loader_of, workers):
    alone, together = loader_of(demo_set / "train"), loader_of(demo_set / "train", workers=workers)
    for epoch in (0, 1):
        assert_same(take(alone, epoch), take(together, epoch))


def test_folder_batches_of_ranks_make_up_the_global_batch(demo_set, loader_of):
    whole = take(loader_of(demo_set / "train"))
    for world in (2, 4):
        parts = [take(loader_of(demo_set / "train", rank=rank, world=world)) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert torch.equal(batch.ids, torch.cat([part[step].ids for part in parts]))
            for i, crop in enumerate(batch.crops):
                assert torch.equal(crop, torch.cat([part[step].crops[i] for part in parts]))


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_starts_at_any_step(demo_set, loader_of, workers):
    straight = loader_of(demo_set / "train")
    epochs = [take(straight, epoch) for epoch in range(2)]
    loader = loader_of(demo_set / "train", workers=workers)
    for epoch, start in ((1, 3), (0, 6), (0, 0), (1, 7)):
        assert_same(take(loader, epoch, start), epochs[epoch][start:])


def test_folder_chain_of_resumes_gives_every_sample_once(demo_set, loader_of):
    ids: list[int] = []
    step, rng = 0, np.random.default_rng(0)
    while step < 15:
        count = min(int(rng.integers(1, 4)), 15 - step)
        ids += [
            i for batch in take(loader_of(demo_set / "train", batch_size=4), 0, step, count) for i in batch.ids.tolist()
        ]
        step += count
    assert sorted(ids) == list(range(60))


def test_folder_orders_and_crops_differ_between_epochs_and_seeds(demo_set, loader_of):
    first, second = (take(loader_of(demo_set / "train"), epoch, count=1)[0] for epoch in (0, 1))
    other = take(loader_of(demo_set / "train", seed=1), count=1)[0]
    assert len({tuple(batch.ids.tolist()) for batch in (first, second, other)}) == 3
    assert not torch.equal(first.crops[0], second.crops[0])


def test_folder_leaves_the_global_random_state_alone(demo_set, loader_of):
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    take(loader_of(demo_set / "train", workers=1), count=2)
    take(loader_of(demo_set / "train"), count=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_folder_workers_live_on_across_epochs(demo_set, loader_of, children):
    loader = loader_of(demo_set / "train", workers=2)
    take(loader, 0)
    workers = {process.pid for process in children()}
    take(loader, 1, count=3)
    take(loader, 1, start_step=3)
    take(loader, 2)
    assert {process.pid for process in children()} == workers and len(workers) == 2
    take(loader, 1, count=1)
    assert not workers & {process.pid for process in children()}


def test_folder_close_may_be_repeated_and_leaves_no_process(demo_set, loader_of, children):
    loader = loader_of(demo_set / "train", workers=2)
    running = loader.epoch(0)
    next(running)
    assert len(children()) == 2
    loader.close()
    loader.close()
    assert children() == []
    with pytest.raises(RuntimeError, match="use the newest iterator only"):
        next(running)
    assert len(take(loader, 1, 6)) == 1  # a closed loader may be used again


def test_folder_refuses_an_iterator_that_was_overtaken(demo_set, loader_of):
    loader = loader_of(demo_set / "train")
    old = loader.epoch(0)
    next(old)
    take(loader, 0, 3, count=1)
    with pytest.raises(RuntimeError, match=r"epoch\(0\): expected to give step 1 next"):
        next(old)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_folder_runs_with_other_start_methods(demo_set, loader_of, monkeypatch, method):
    expected = take(loader_of(demo_set / "train"), count=2)
    monkeypatch.setattr("fastmim_pipelines.workers.start_method", lambda: method)
    assert_same(take(loader_of(demo_set / "train", workers=1), count=2), expected)


def test_folder_reads_many_channels_from_arrays(tmp_path, loader_of):
    rng = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", rng.integers(0, 256, (20, 30, 7), dtype=np.uint8))
    batch = take(loader_of(tmp_path, (CropSpec((16, 16)),), batch_size=4, in_chans=7))[0]
    assert batch.crops[0].shape == (4, 7, 16, 16)
    with pytest.raises(DataError, match="expected 3 channels, got 7"):
        take(loader_of(tmp_path, batch_size=4))


def test_folder_smaller_than_a_batch_is_refused(demo_set):
    with pytest.raises(
        ValueError, match=r"batch_size: expected at most the 60 images of .*, got 64; use a smaller batch"
    ):
        FolderLoader(demo_set / "train", CROPS, batch_size=64)
    assert FolderLoader(demo_set / "train", CROPS, batch_size=60).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "world": 4}, "multiple of 4"),
        ({"rank": 1}, "rank: expected"),
        ({"in_chans": 0}, "in_chans"),
        ({"on_bad_image": "ignore"}, "expected error or skip"),
    ],
)
def test_folder_checks_its_arguments(demo_set, options, message):
    with pytest.raises(ValueError, match=message):
        FolderLoader(demo_set / "train", CROPS, **{"batch_size": 8, **options})


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (0, 8)])
def test_folder_refuses_places_that_do_not_exist(demo_set, loader_of, epoch, step):
    with pytest.raises(ValueError, match="start_step: expected"):
        loader_of(demo_set / "train").epoch(epoch, step)


@pytest.fixture
def damaged(demo_set, tmp_path) -> tuple[Path, list[int]]:
    """A copy of the training pictures with three files spoiled, and their sample ids."""
    folder = tmp_path / "damaged"
    shutil.copytree(demo_set / "train", folder)
    index, spoiled = FolderIndex(folder), [4, 21, 50]
    whole = Path(index.path(4)).read_bytes()
    for sample_id, data in zip(spoiled, (whole[: len(whole) // 2], b"", b"<html>404</html>")):
        Path(index.path(sample_id)).write_bytes(data)
    return folder, spoiled


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_error_names_sample_path_and_way_out(damaged, loader_of, workers, children):
    folder, spoiled = damaged
    with pytest.raises(DataError, match="--on-bad-image skip") as error:
        take(loader_of(folder, workers=workers))
    message, index = str(error.value), FolderIndex(folder)
    assert any(message.startswith(f"{index.path(i)}: ") and f"(sample {i})" in message for i in spoiled)
    assert error.value.exit_code == 4 and "\n" not in message
    assert children() == []


def test_folder_skip_substitutes_the_same_everywhere(damaged, loader_of):
    folder, spoiled = damaged
    index = FolderIndex(folder)
    straight = loader_of(folder, on_bad_image="skip")
    whole = take(straight)
    assert_same(whole, take(loader_of(folder, on_bad_image="skip", workers=2)))
    assert_same(whole[5:], take(loader_of(folder, on_bad_image="skip"), 0, 5))
    parts = [take(loader_of(folder, on_bad_image="skip", rank=rank, world=2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.crops[0], torch.cat([part[step].crops[0] for part in parts]))

    met = [(batch, slot, i) for batch in whole for slot, i in enumerate(batch.ids.tolist()) if i in spoiled]
    assert len(met) >= 2  # one may be in the part of the order left out
    for batch, slot, sample_id in met:
        other = next(i for i in (substitute(0, 0, sample_id, k, 60) for k in range(16)) if i not in spoiled)
        image = Image.open(index.path(other)).convert("RGB")
        left, top, w, h = crop_box(0, 0, sample_id, 0, *image.size, CROPS[0].scale, CROPS[0].ratio)
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        assert np.array_equal(batch.crops[0][slot].numpy(), np.asarray(expected).transpose(2, 0, 1))
    assert {path for path, _ in straight.bad_images} <= {index.path(i) for i in spoiled}
    assert len(straight.bad_images) == len(met)
    assert all(reason for _, reason in straight.bad_images)


def test_folder_skip_counts_what_the_consumer_saw(damaged, loader_of):
    folder, _ = damaged
    straight, ahead = (loader_of(folder, on_bad_image="skip", workers=workers) for workers in (0, 2))
    for a, b in zip(straight.epoch(0), ahead.epoch(0)):
        assert torch.equal(a.ids, b.ids) and straight.bad_images == ahead.bad_images


def test_folder_skip_ends_beyond_its_budget(demo_set, tmp_path, loader_of):
    folder = tmp_path / "half"
    shutil.copytree(demo_set / "train", folder)
    index = FolderIndex(folder)
    for sample_id in range(0, 60, 2):
        Path(index.path(sample_id)).write_bytes(b"")
    loader = loader_of(folder, on_bad_image="skip")
    with pytest.raises(
        DataError, match=r"1\d of \d+ images were unusable, more than 0.10% and 10; check the data"
    ) as error:
        take(loader)
    assert error.value.exit_code == 4 and error.value.path.startswith(str(folder))
    assert len(take(loader_of(folder, on_bad_image="skip", bad_image_budget=2.0))) == 7


def test_folder_skip_gives_up_where_nothing_is_usable(tmp_path, loader_of):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match="16 images in its place were unusable, too"):
        take(loader_of(tmp_path, batch_size=1, on_bad_image="skip", bad_image_budget=100.0))


def test_folder_flat_and_nested_files_are_read(demo_set, tmp_path, loader_of):
    for i, path in enumerate(sorted((demo_set / "val").rglob("*.jpg"))[:8]):
        target = tmp_path / ("." if i % 2 else "a/b/c") / f"{i}.JPG"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    loader = loader_of(tmp_path)
    assert loader.steps_per_epoch == 1 and loader.index.labels is None and len(take(loader)) == 1
