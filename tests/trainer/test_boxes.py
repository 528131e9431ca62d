"""Boxes from heat maps, and their schedule and state."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastmim import boxes
from fastmim.boxes import HeatBoxes, find_boxes, mass_boxes, threshold_boxes, update_steps
from fastmim.config import ConfigError

WHOLE = [0.0, 0.0, 1.0, 1.0]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- a box from a heat map


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("center, sigma", [((100.0, 120.0), (15.0, 25.0)), ((10.0, 200.0), (20.0, 10.0))])
def test_threshold_box_of_a_gaussian_is_where_it_exceeds_a_tenth(scale, center, sigma):
    """|x - c| < sigma sqrt(2 ln 10), cut at the border, whatever the map's scale and offset; 224 pixels."""
    y, x = (torch.arange(224.0) - c for c in center)
    heat = torch.exp(-(y[:, None] ** 2) / (2 * sigma[0] ** 2) - x**2 / (2 * sigma[1] ** 2))
    (box,) = threshold_boxes(scale * heat[None] + 3 * scale, (224, 224)) * 224
    reach = [s * math.sqrt(2 * math.log(10)) for s in sigma]
    expected = [max(c - r, 0) for c, r in zip(center, reach)] + [min(c + r, 223) for c, r in zip(center, reach)]
    assert box.tolist() == pytest.approx(expected, abs=1)


def slow_threshold_box(heat: torch.Tensor, size: tuple[int, int]) -> list[float]:
    """Pixel by pixel: bilinear between cell centers, the border's value beyond them."""
    h, w = heat.shape
    low, high = heat.min().item(), heat.max().item()
    rows, columns = set(), set()
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
            top, left = int(y), int(x)
            value = 0.0
            for r, share_r in ((top, 1 - (y - top)), (min(top + 1, h - 1), y - top)):
                for c, share_c in ((left, 1 - (x - left)), (min(left + 1, w - 1), x - left)):
                    value += share_r * share_c * (heat[r, c].item() - low) / (high - low)
            if value > 0.1:
                rows.add(i)
                columns.add(j)
    return [min(rows) / size[0], min(columns) / size[1], max(rows) / size[0], max(columns) / size[1]]


@pytest.mark.parametrize("grid, size", [((3, 4), (24, 20)), ((14, 14), (56, 56)), ((5, 3), (5, 3)), ((1, 4), (7, 9))])
def test_threshold_box_equals_loops_over_pixels(grid, size):
    # Steep maps: most of the image is cold.
    heat = noise(6, *grid).double() ** 12 * 5 - 2
    for box, one in zip(threshold_boxes(heat, size).tolist(), heat):
        assert box == pytest.approx(slow_threshold_box(one.float().double(), size), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25, float("nan")])
def test_box_of_a_constant_map_is_the_whole_image(value):
    heat = noise(3, 4, 5)
    heat[1] = value
    for found in (threshold_boxes(heat, (32, 40)), mass_boxes(heat)):
        assert found[1].tolist() == WHOLE
        assert (found[0] != found[1]).any() and torch.isfinite(found).all()


def slow_mass_box(heat: torch.Tensor, mass: float) -> list[float]:
    """All boxes one by one."""
    h, w = heat.shape
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    best = None
    for top in range(h):
        for bottom in range(top + 1, h + 1):
            for left in range(w):
                for right in range(left + 1, w + 1):
                    inside = heat[top:bottom, left:right].sum()
                    area = (bottom - top) * (right - left)
                    if inside >= (mass - 1e-6) * heat.sum() and (best is None or area < best[0]):
                        best = (area, [top / h, left / w, bottom / h, right / w])
    return best[1]


@pytest.mark.parametrize("grid", [(3, 5), (6, 4), (1, 7), (4, 1)], ids=str)
@pytest.mark.parametrize("mass", [0.6, 0.95, 0.1])
def test_mass_box_is_the_smallest_of_all_boxes(grid, mass):
    heat = torch.cat([noise(4, *grid), noise(3, *grid, seed=1).round(decimals=1)]).double() ** 3
    for box, one in zip(mass_boxes(heat, mass).tolist(), heat.float().double()):
        assert box == pytest.approx(slow_mass_box(one, mass), abs=1e-6)


def test_mass_box_of_a_single_hot_cell_is_that_cell():
    heat = torch.zeros(1, 14, 14)
    heat[0, 3, 9] = 2.0
    assert mass_boxes(heat)[0].tolist() == pytest.approx([3 / 14, 9 / 14, 4 / 14, 10 / 14])


# ---- boxes of a data set


def heat_of_ids(images: torch.Tensor) -> torch.Tensor:
    """A hot spot whose column is the image's first pixel value."""
    heat = torch.full((len(images), 4, 8), 1.0)
    heat[torch.arange(len(images)), 2, images[:, 0, 0, 0].long() % 8] = 9.0
    return heat


def share_of(ids: list[int], batch_size: int = 2) -> list[tuple]:
    parts = torch.tensor(ids).split(batch_size)
    return [(part.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 32), None, part) for part in parts]


def test_found_boxes_stand_in_the_order_of_the_ids_and_unread_images_are_whole():
    found, rule = find_boxes(heat_of_ids, share_of([6, 0, 3, 1]), 8, (16, 32), torch.device("cpu"))
    assert rule == "what is over 10 % of the peak"
    for i in range(8):
        expected = threshold_boxes(heat_of_ids(share_of([i])[0][0]), (16, 32))[0] if i in (0, 1, 3, 6) else WHOLE
        assert found[i].tolist() == list(expected)


def test_found_boxes_of_two_ranks_are_those_of_one(monkeypatch):
    """Each rank has zeros where the other has boxes; the collective adds them up."""
    alone, _ = find_boxes(heat_of_ids, share_of(list(range(7))), 8, (16, 32), torch.device("cpu"))
    sent = []
    monkeypatch.setattr(boxes, "world_size", lambda: 2)
    monkeypatch.setattr(boxes.torch.distributed, "all_reduce", lambda x: sent.append(x.clone()))
    find_boxes(heat_of_ids, share_of([0, 1, 2, 3]), 8, (16, 32), torch.device("cpu"))
    monkeypatch.setattr(boxes.torch.distributed, "all_reduce", lambda x: x.add_(sent[0]))
    second, _ = find_boxes(heat_of_ids, share_of([4, 5, 6]), 8, (16, 32), torch.device("cpu"))
    assert torch.equal(second, alone)


@pytest.mark.parametrize("size", [(128, 128), (16, 8)], ids=str)
@pytest.mark.parametrize("single, crowded", [(0, True), (1, False)])
def test_boxes_that_are_nearly_everything_give_way_to_the_mass_rule(size, single, crowded):
    """Eight noisy maps, which a tenth of the peak fills; one map with a single hot cell brings the mean below 95 %."""
    heat = noise(8, 8, 8)
    heat[:single] = F.one_hot(torch.tensor(20), 64).view(8, 8).float()
    batches = [(torch.zeros(8, 3, *size, dtype=torch.uint8), None, torch.arange(8))]
    found, rule = find_boxes(lambda images: heat, batches, 8, size, torch.device("cpu"))
    by_threshold = threshold_boxes(heat, size)
    largest = (size[0] - 1) * (size[1] - 1) / (size[0] * size[1])
    assert (boxes.area(by_threshold).mean() > 0.95 * largest) == crowded
    expected = mass_boxes(heat) if crowded else by_threshold
    assert torch.equal(found, expected) and ("60 % of the heat" in rule) == crowded


# ---- when


@pytest.mark.parametrize(
    "shares, total, steps_per_epoch, expected",
    [
        ((0.2, 0.4, 0.6, 0.8), 300 * 7, 7, [60 * 7, 120 * 7, 180 * 7, 240 * 7]),
        ((0.2, 0.4, 0.6, 0.8), 16, 4, [4, 8, 12]),  # epochs 0.8, 1.6, 2.4, 3.2: the nearest, each once
        ((0.2, 0.8), 8, 4, []),  # epochs 0.4 and 1.6 round to the start and the end of the run
        ((0.5,), 17, 4, [8]),
        ((), 100, 10, []),
    ],
)
def test_updates_are_at_the_nearest_epoch_starts(shares, total, steps_per_epoch, expected):
    assert update_steps(shares, total, steps_per_epoch) == expected


class RecordingLoader:
    steps_per_epoch = 4

    def __init__(self):
        self.given = []

    def set_boxes(self, found):
        self.given.append(found)


def heat_boxes(first_box=(0.25, 0.25, 0.75, 0.75), box_updates=(0.5,), count=8, total=16):
    """A HeatBoxes whose heat maps change at each update, and the list of updates."""
    updates = []

    def heat_map(images):
        return heat_of_ids(images + len(updates))

    class Reader:
        def __iter__(self):
            updates.append(len(updates))
            return iter(share_of(list(range(count))))

    class Whole:
        def __enter__(self): ...

        def __exit__(self, *error): ...

    method = SimpleNamespace(
        first_box=first_box, box_updates=box_updates, heat_map=heat_map, model=SimpleNamespace(image_size=(16, 32))
    )
    engine = SimpleNamespace(whole=Whole, autocast=Whole, device=torch.device("cpu"))
    loader = RecordingLoader()
    state = HeatBoxes(method, engine, loader, Reader(), count=count, total=total, say=lambda line: None)
    return state, loader, updates


def test_boxes_are_given_once_and_found_at_their_step():
    state, loader, updates = heat_boxes()
    for step in range(16):
        state.prepare(step)
        assert len(updates) == (step >= 8)
        assert state.values()["box_area"] == pytest.approx(0.25 if step < 8 else float(np.prod(
            loader.given[1][:, 2:] - loader.given[1][:, :2], axis=1).mean()))  # fmt: skip
    first, second = loader.given
    assert first.dtype == second.dtype == np.float32
    assert first.tolist() == [[0.25, 0.25, 0.75, 0.75]] * 8
    assert second.shape == (8, 4) and (second != first).all(axis=1).any()


def test_boxes_without_a_first_one_are_whole_images():
    state, loader, _ = heat_boxes(first_box=None)
    state.prepare(0)
    assert loader.given == [None] and state.values() == {}


@pytest.mark.parametrize("stop", [3, 8, 9, 16])
def test_boxes_of_a_resumed_run_are_those_of_a_straight_one(tmp_path, stop):
    """Stopped before, at and after the update at step 8: it happens once in the course that counts."""
    straight, straight_loader, _ = heat_boxes()
    for step in range(stop):
        straight.prepare(step)
    straight.save(tmp_path)
    assert (tmp_path / "boxes.safetensors").exists() == (stop > 8)
    for step in range(stop, 16):
        straight.prepare(step)
    resumed, loader, updates = heat_boxes()
    resumed.load(tmp_path)
    for step in range(stop, 16):
        resumed.prepare(step)
    assert len(updates) == (stop <= 8)
    if stop < 16:
        assert np.array_equal(loader.given[-1], straight_loader.given[-1])
        assert resumed.values() == straight.values()


def test_boxes_of_other_data_are_refused(tmp_path):
    state, _, _ = heat_boxes()
    state.prepare(8)
    state.save(tmp_path)
    other, _, _ = heat_boxes(count=9)
    with pytest.raises(ConfigError, match="has boxes of 8 images, --data has 9; use the same data"):
        other.load(tmp_path)
