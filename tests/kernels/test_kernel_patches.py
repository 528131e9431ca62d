"""Patch gather against slicing, one image and one patch at a time."""

import fastmim_kernels as fk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def slow_patches(images, ids, p, mean=None, std=None, size=None, offset=None, flip=None):
    """The definition in loops and float64."""
    rows = []
    for i, image in enumerate(images):
        x = image.double() / 255 if image.dtype == torch.uint8 else image.double()
        if flip is not None and flip[i]:
            x = x.flip(-1)
        h, w = size or x.shape[1:]
        top, left = (0, 0) if offset is None else offset[i].tolist()
        x = x[:, top : top + h, left : left + w]
        if mean is not None:
            x = torch.stack([(plane - m) / s for plane, m, s in zip(x, mean, std, strict=True)])
        chosen = range((h // p) * (w // p)) if ids is None else ids[i].tolist()
        for patch in chosen:
            y, z = patch // (w // p) * p, patch % (w // p) * p
            rows.append([float(x[c, y + r, z + q]) for r in range(p) for q in range(p) for c in range(len(x))])
    return torch.tensor(rows, dtype=torch.float64).view(len(images), -1, p * p * images.shape[1])


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    data=st.data(), p=st.integers(1, 4), gh=st.integers(1, 3), gw=st.integers(1, 3), channels=st.sampled_from([1, 2, 3])
)
def test_patchify_gather_equals_slicing(data, p, gh, gw, channels):
    h, w = gh * p, gw * p
    images = random_images(2, channels, h + data.draw(st.integers(0, 4)), w + data.draw(st.integers(0, 4)))
    draw = lambda high: data.draw(st.integers(0, high))  # noqa: E731
    offset = torch.tensor([[draw(images.shape[2] - h), draw(images.shape[3] - w)] for _ in range(2)])
    named = {
        "size": (h, w),
        "offset": data.draw(st.sampled_from([None, offset])),
        "flip": data.draw(st.sampled_from([None, torch.tensor([True, False]), torch.tensor([True, True])])),
        **data.draw(st.sampled_from([{}, {"mean": MEAN[:channels], "std": STD[:channels]}])),
    }
    ids = data.draw(st.sampled_from([None, torch.tensor([[draw(gh * gw - 1)] for _ in range(2)])]))
    got = fk.patchify_gather(images, ids, p, **named)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), slow_patches(images, ids, p, **named), atol=2e-6, rtol=0)


def test_flip_comes_before_the_window():
    images = random_images(1, 3, 8, 12)
    got = fk.patchify_gather(images, None, 4, size=(4, 4), offset=torch.tensor([[2, 1]]), flip=torch.tensor([True]))
    expected = images.flip(3)[:, :, 2:6, 1:5].permute(0, 2, 3, 1).reshape(1, 1, 48) / 255
    assert torch.equal(got, expected)


def test_value_order_is_row_column_channel():
    images = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    got = fk.patchify_gather(images, torch.tensor([[3]]), 2)
    assert got.tolist() == [[[10, 26, 11, 27, 14, 30, 15, 31]]]


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_non_contiguous_images(layout):
    images = random_images(2, 3, 16, 20)
    strided = {
        "channels_last": images.to(memory_format=torch.channels_last),
        "strided": random_images(2, 3, 32, 60)[:, :, ::2, ::3],
        "expanded": images[:1].expand(4, -1, -1, -1),
    }[layout]
    ids = torch.tensor([[0, 7], [19, 3]]).repeat(2, 1)[: len(strided)].flip(1)
    assert torch.equal(
        fk.patchify_gather(strided, ids, 4), fk.patchify_gather(strided.contiguous(), ids.contiguous(), 4)
    )


def test_float_images_and_low_precision_results():
    images = random_images(2, 3, 16, 16)
    floats = images / 255
    named = {"mean": MEAN, "std": STD}
    torch.testing.assert_close(
        fk.patchify_gather(floats, None, 8, **named), fk.patchify_gather(images, None, 8, **named), atol=1e-6, rtol=0
    )
    rounded = fk.patchify_gather(images, None, 8, dtype=torch.bfloat16, **named)
    assert torch.equal(rounded, fk.patchify_gather(images, None, 8, **named).bfloat16())
    assert fk.patchify_gather(images, None, 8, dtype=torch.float64).dtype == torch.float64


def test_gradient_reaches_float_images():
    images = torch.rand(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    ids, flip = torch.tensor([[2, 0]]), torch.tensor([True])

    def cut(x):
        return fk.patchify_gather(x, ids, 2, mean=(0.1, 0.2), std=(0.3, 0.4), flip=flip, dtype=torch.float64)

    assert torch.autograd.gradcheck(cut, images)


IMAGES = random_images(2, 3, 16, 24)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES[0]}, ValueError, r"images: expected shape \(B, C, H, W\)"),
        ({"images": IMAGES.long()}, TypeError, "images: expected uint8 in 0..255 or floats in 0..1, got torch.int64"),
        ({"patch_size": 5}, ValueError, "patch_size: expected a divisor of the image sides 16x24, got 5; change"),
        ({"patch_size": 0}, ValueError, "patch_size: expected a divisor"),
        ({"size": (17, 8)}, ValueError, r"size: expected a window \(h, w\) inside the 16x24 images, got \(17, 8\)"),
        (
            {"size": (8, 8), "offset": torch.tensor([[9, 0], [0, 0]])},
            ValueError,
            r"offset: expected \(top, left\) in 0..8, 0..16",
        ),
        ({"size": (8, 8), "offset": torch.tensor([[0, -1], [0, 0]])}, ValueError, "offset: expected"),
        ({"offset": torch.zeros(2, 2)}, TypeError, "offset: expected torch.int64, got torch.float32"),
        (
            {"offset": torch.zeros(1, 2, dtype=torch.int64)},
            ValueError,
            r"offset: expected shape \(2, 2\), got \(1, 2\)",
        ),
        ({"flip": torch.zeros(2)}, TypeError, "flip: expected torch.bool"),
        ({"flip": torch.zeros(3, dtype=torch.bool)}, ValueError, r"flip: expected shape \(2,\), got \(3,\)"),
        ({"mean": MEAN}, ValueError, "mean, std: expected 3 numbers each"),
        ({"mean": MEAN[:1], "std": STD[:1]}, ValueError, "mean, std: expected 3 numbers each"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, ValueError, "mean, std: expected 3 numbers each, std > 0"),
        ({"ids": torch.tensor([[6], [0]])}, IndexError, r"ids: expected patch ids in 0..5, got 0..6"),
        ({"ids": torch.tensor([[-1], [0]])}, IndexError, "ids: expected patch ids in 0..5"),
        ({"ids": torch.tensor([[0]])}, ValueError, r"ids: expected shape \(2, 1\), got \(1, 1\)"),
        ({"ids": torch.tensor([[0], [1]], dtype=torch.int32)}, TypeError, "ids: expected torch.int64"),
        ({"dtype": torch.uint8}, TypeError, "dtype: expected a floating dtype"),
    ],
)
def test_wrong_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        fk.patchify_gather(**{"images": IMAGES, "ids": None, "patch_size": 8, **change})
