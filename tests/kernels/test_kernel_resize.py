"""Resized crops against Pillow, which the loaders resize with."""

import fastmim_kernels as fk
import numpy as np
import pytest
import torch
from PIL import Image

BOXES = [
    (0, 0, 61, 47), (3, 5, 20, 30), (40, 1, 21, 9), (60, 46, 1, 1), (0.25, 3.5, 40.7, 33.1), (10, 0, 1, 47), (7, 7, 24, 18),
]  # fmt: skip


def pixels(*shape: int) -> torch.Tensor:
    """Noise, and gradients, for which neighbors matter."""
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ramp = torch.linspace(0, 255, shape[-1]).expand(shape).to(torch.uint8)
    return torch.where(torch.arange(shape[0]).view(-1, 1, 1, 1) % 2 == 0, noise, ramp)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(18, 24), (47, 61), (90, 7), (1, 1)])
def test_equals_pillow_within_one_level(interpolation, size):
    images = pixels(len(BOXES), 3, 47, 61)
    got = fk.random_resized_crop(images, torch.tensor(BOXES), size, interpolation=interpolation)
    expected = np.stack([
        np.asarray(
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
                (size[1], size[0]), Image.Resampling[interpolation.upper()], (x, y, min(x + w, 61), min(y + h, 47))
            )
        ).transpose(2, 0, 1)
        for image, (x, y, w, h) in zip(images, BOXES, strict=True)
    ])  # fmt: skip
    difference = (got.int() - torch.from_numpy(expected.astype(np.int32))).abs()
    assert difference.max() <= 1
    # Only ties of the rounding.
    assert (difference > 0).float().mean() < 0.01


def test_floats_are_the_levels_over_255_normalized_and_flipped():
    images, boxes = pixels(2, 3, 20, 30), torch.tensor([[2, 3, 11, 13], [0, 0, 30, 20]])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    flip = torch.tensor([True, False])
    level = fk.random_resized_crop(images, boxes, (9, 7))
    level[0] = level[0].flip(2)
    got = fk.random_resized_crop(images, boxes, (9, 7), flip=flip, mean=mean, std=std, dtype=torch.float32)
    expected = (level / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(got, expected)


def test_whole_image_at_its_own_size_is_the_image():
    images = pixels(2, 3, 12, 9)
    boxes = torch.tensor([[0, 0, 9, 12]]).expand(2, 4)
    for interpolation in ("bilinear", "bicubic"):
        assert torch.equal(fk.random_resized_crop(images, boxes, (12, 9), interpolation=interpolation), images)


def test_boxes_outside_of_the_image_are_refused():
    images = pixels(1, 3, 12, 9)
    for box in ([0, 0, 10, 12], [-1, 0, 3, 3], [0, 0, 0, 5], [8.5, 0, 1, 1]):
        with pytest.raises(ValueError, match=r"boxes: expected \(left, top, width, height\) inside the 12x9 images"):
            fk.random_resized_crop(images, torch.tensor([box]), (4, 4))
