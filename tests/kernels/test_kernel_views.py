"""Views against colorsys, Pillow, direct convolution, slicing, and a slow re-computation of the whole op."""

import colorsys
import math

import fastmim_kernels as fk
import numpy as np
import pytest
import torch

LUMA = np.array([0.2989, 0.587, 0.114])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def jitter_of(order, amounts, apply=True):
    """A ColorJitter for one image; the changes that ``amounts`` does not name are neutral."""
    neutral = {BRIGHTNESS: 1.0, CONTRAST: 1.0, SATURATION: 1.0, HUE: 0.0, **amounts}
    return fk.ColorJitter(torch.tensor([apply]), torch.tensor([order]), *(torch.tensor([neutral[i]]) for i in range(4)))


def slow_hue(image, turns):
    out = np.empty_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*image[:, y, x])
        out[:, y, x] = colorsys.hsv_to_rgb((h + turns) % 1.0, s, v)
    return out


def slow_blur(image, sigma, radius):
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    _, h, w = image.shape
    out = np.zeros_like(image)
    for y, x in np.ndindex(h, w):
        for i, ti in enumerate(taps):
            for j, tj in enumerate(taps):
                row, col = min(max(y + i - radius, 0), h - 1), min(max(x + j - radius, 0), w - 1)
                out[:, y, x] += ti * tj * image[:, row, col]
    return out


def slow_change(image, code, amounts):
    grey = np.tensordot(LUMA, image, 1)
    if code == HUE:
        return slow_hue(image, amounts[HUE])
    other = {BRIGHTNESS: 0.0, CONTRAST: grey.mean(), SATURATION: grey}[code]
    return np.clip(amounts[code] * image + (1 - amounts[code]) * other, 0, 1)


def slow_view(images, i, size, offset, flip, jitter, grey, sigma, max_sigma):
    x = images[i].double().numpy() / 255
    x = x[:, :, ::-1] if flip[i] else x
    (top, left), (h, w) = offset[i].tolist(), size
    x = x[:, top : top + h, left : left + w].copy()
    if jitter.apply[i]:
        for code in jitter.order[i].tolist():
            x = slow_change(x, code, [float(amount[i]) for amount in jitter[2:]])
    if grey[i]:
        x = np.repeat(np.tensordot(LUMA, x, 1)[None], 3, 0)
    if sigma[i] > 0:
        x = slow_blur(x, float(sigma[i]), math.ceil(3 * max_sigma))
    return torch.tensor((x - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)))


@pytest.mark.parametrize("piece", [1, 1000, 1 << 18])
def test_whole_op_equals_a_slow_recomputation(piece, monkeypatch):
    from fastmim_kernels.views import reference

    # Pieces of one image, of a few, and the whole batch at once.
    monkeypatch.setattr(reference, "PIECE", piece)
    batch, size, g = 9, (10, 13), torch.Generator().manual_seed(3)
    images = random_images(batch, 3, 14, 17)
    offset = torch.stack([torch.randint(0, 5, (batch,), generator=g), torch.randint(0, 5, (batch,), generator=g)], 1)
    flip, grey = torch.arange(batch) % 2 == 0, torch.arange(batch) % 4 == 3
    factors = [0.5 + torch.rand(batch, generator=g) for _ in range(3)]
    order = torch.rand(batch, 4, generator=g).argsort(1)
    jitter = fk.ColorJitter(torch.arange(batch) % 5 != 2, order, *factors, torch.rand(batch, generator=g) - 0.5)
    sigma = torch.where(torch.arange(batch) % 3 == 0, 0.0, 0.2 + 1.3 * torch.rand(batch, generator=g))
    got = fk.shift_flip_jitter(
        images,
        size=size,
        offset=offset,
        flip=flip,
        jitter=jitter,
        grey=grey,
        blur_sigma=sigma,
        max_blur_sigma=1.5,
        mean=MEAN,
        std=STD,
    )
    assert got.shape == (batch, 3, 10, 13) and got.dtype == torch.float32 and got.is_contiguous()
    expected = torch.stack([slow_view(images, i, size, offset, flip, jitter, grey, sigma, 1.5) for i in range(batch)])
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)


def test_window_and_flip_equal_slicing():
    images = random_images(4, 2, 9, 11)
    offset, flip = torch.tensor([[0, 0], [2, 5], [1, 3], [4, 0]]), torch.tensor([True, True, False, False])
    got = fk.shift_flip_jitter(images, size=(5, 6), offset=offset, flip=flip)
    for i, (top, left) in enumerate(offset.tolist()):
        master = images[i].flip(2) if flip[i] else images[i]
        assert torch.equal(got[i], master[:, top : top + 5, left : left + 6] / 255)


def test_windows_are_the_pixels_that_patchify_gather_sees():
    images = random_images(3, 3, 40, 40)
    cut = {
        "size": (32, 16),
        "offset": torch.tensor([[8, 24], [0, 3], [5, 0]]),
        "flip": torch.tensor([True, False, True]),
    }
    view = fk.shift_flip_jitter(images, mean=MEAN, std=STD, **cut)
    patches = fk.patchify_gather(images, None, 8, mean=MEAN, std=STD, **cut)
    torch.testing.assert_close(fk.patchify_gather(view, None, 8), patches, atol=2e-6, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_equals_colorsys(turns):
    images = random_images(1, 3, 12, 12)
    # Corner cases: grey, black, white, ties of the maximum, pure colors.
    corners = [
        (0, 0, 0),
        (255, 255, 255),
        (7, 7, 7),
        (9, 9, 4),
        (9, 4, 9),
        (4, 9, 9),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (1, 0, 0),
    ]
    images[0, :, 0, : len(corners)] = torch.tensor(corners, dtype=torch.uint8).T
    got = fk.shift_flip_jitter(images, size=(12, 12), jitter=jitter_of([3, 0, 1, 2], {HUE: turns}))
    expected = slow_hue(images[0].double().numpy() / 255, turns)
    torch.testing.assert_close(got[0].double(), torch.tensor(expected), atol=2e-6, rtol=0)
    assert got.min() >= 0 and got.max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color"])
def test_one_change_equals_pillow(name, factor):
    image, enhance = (
        pytest.importorskip("PIL.Image", reason="needs Pillow"),
        pytest.importorskip("PIL.ImageEnhance", reason="needs Pillow"),
    )
    images = random_images(1, 3, 16, 16)
    code = {"Brightness": BRIGHTNESS, "Contrast": CONTRAST, "Color": SATURATION}[name]
    got = fk.shift_flip_jitter(images, size=(16, 16), jitter=jitter_of([0, 1, 2, 3], {code: factor}))
    pil = getattr(enhance, name)(image.fromarray(images[0].permute(1, 2, 0).numpy())).enhance(factor)
    expected = torch.tensor(np.array(pil)).permute(2, 0, 1) / 255
    # Pillow rounds the mean, the grey image and the result to 8 bits; an error of half a level is multiplied by
    # |1 - factor|.
    assert (got[0] - expected).abs().max() <= (1 + 0.5 * abs(1 - factor) + 0.1) / 255


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 1, 0, 3], [1, 3, 2, 0]])
def test_three_changes_in_order_equal_pillow(order):
    image, enhance = (
        pytest.importorskip("PIL.Image", reason="needs Pillow"),
        pytest.importorskip("PIL.ImageEnhance", reason="needs Pillow"),
    )
    images = random_images(1, 3, 16, 16, seed=5)
    amounts = {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.4}
    got = fk.shift_flip_jitter(images, size=(16, 16), jitter=jitter_of(order, amounts))
    pil = image.fromarray(images[0].permute(1, 2, 0).numpy())
    for code in order:
        if code in amounts:
            pil = getattr(enhance, ("Brightness", "Contrast", "Color")[code])(pil).enhance(amounts[code])
    assert (got[0] - torch.tensor(np.array(pil)).permute(2, 0, 1) / 255).abs().max() <= 4 / 255


def test_order_matters_and_is_per_image():
    images = random_images(1, 3, 8, 8).expand(2, -1, -1, -1)
    two = [jitter_of(order, {BRIGHTNESS: 1.4, CONTRAST: 0.5}) for order in ([0, 1, 2, 3], [1, 0, 2, 3])]
    both = fk.shift_flip_jitter(
        images, size=(8, 8), jitter=fk.ColorJitter(*(torch.cat(pair) for pair in zip(*two, strict=True)))
    )
    for i in (0, 1):
        assert torch.equal(both[i], fk.shift_flip_jitter(images[:1], size=(8, 8), jitter=two[i])[0])
    assert not torch.allclose(both[0], both[1], atol=0.01)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("size", [(9, 7), (1, 3)])
def test_blur_equals_direct_convolution(sigma, size):
    images = random_images(1, 3, *size)
    got = fk.shift_flip_jitter(images, size=size, blur_sigma=torch.tensor([sigma]))
    torch.testing.assert_close(
        got[0].double(), torch.tensor(slow_blur(images[0].double().numpy() / 255, sigma, 6)), atol=1e-6, rtol=0
    )


def test_blur_of_a_small_radius_on_wide_low_images():
    """A row with its borders is then longer than all the borders of the plane, which have the room beside it."""
    images = random_images(1, 3, 2, 60)
    got = fk.shift_flip_jitter(images, size=(2, 60), blur_sigma=torch.tensor([0.3]), max_blur_sigma=0.3)
    expected = torch.tensor(slow_blur(images[0].double().numpy() / 255, 0.3, 1))
    torch.testing.assert_close(got[0].double(), expected, atol=1e-6, rtol=0)


def test_blur_keeps_flat_images_and_sigma_0_keeps_all():
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    torch.testing.assert_close(fk.shift_flip_jitter(flat, size=(8, 8), blur_sigma=torch.tensor([0.5, 2.0])), flat / 255)
    images = random_images(2, 3, 8, 8)
    assert torch.equal(fk.shift_flip_jitter(images, size=(8, 8), blur_sigma=torch.zeros(2)), images / 255)


def test_grey_is_luma_in_every_channel():
    images = random_images(2, 3, 6, 6)
    got = fk.shift_flip_jitter(images, size=(6, 6), grey=torch.tensor([True, False]))
    expected = torch.tensor(np.tensordot(LUMA, images[0].double().numpy() / 255, 1)).expand(3, -1, -1)
    torch.testing.assert_close(got[0].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(got[1], images[1] / 255)


def test_images_left_alone_stay_exact():
    images = random_images(3, 3, 8, 8)
    jitter = fk.ColorJitter(
        torch.tensor([False, True, False]),
        torch.arange(4).repeat(3, 1),
        *(torch.full((3,), v) for v in (1.4, 0.6, 1.4, 0.1)),
    )
    got = fk.shift_flip_jitter(images, size=(8, 8), jitter=jitter)
    assert torch.equal(got[::2], images[::2] / 255) and not torch.allclose(got[1], images[1] / 255, atol=0.01)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_without_color_skip_saturation_hue_and_grey(channels):
    images = random_images(1, channels, 8, 8)
    jitter = jitter_of([3, 2, 1, 0], {BRIGHTNESS: 1.2, CONTRAST: 0.7, SATURATION: 0.1, HUE: 0.4})
    got = fk.shift_flip_jitter(images, size=(8, 8), jitter=jitter, grey=torch.tensor([True]))
    x = images.double() / 255
    expected = ((0.7 * x + 0.3 * x.mean()).clamp(0, 1) * 1.2).clamp(0, 1)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_float_images_and_low_precision_results():
    images = random_images(2, 3, 12, 12).to(memory_format=torch.channels_last)
    named = {
        "size": (8, 8),
        "jitter": fk.ColorJitter(*(torch.cat([t, t]) for t in jitter_of([2, 3, 0, 1], {HUE: 0.2, SATURATION: 0.5}))),
    }
    full = fk.shift_flip_jitter(images, **named)
    floats = images / 255
    before = floats.clone()
    assert torch.equal(fk.shift_flip_jitter(floats, **named), full) and torch.equal(floats, before)
    assert torch.equal(fk.shift_flip_jitter(images, dtype=torch.bfloat16, **named), full.bfloat16())


IMAGES = random_images(2, 3, 12, 12)
GOOD = fk.ColorJitter(*(torch.cat([t, t]) for t in jitter_of([0, 1, 2, 3], {})))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": (13, 8)}, ValueError, "size: expected a window"),
        ({"offset": torch.tensor([[5, 0], [0, 0]])}, ValueError, r"offset: expected \(top, left\) in 0..4, 0..4"),
        ({"jitter": GOOD._replace(apply=torch.ones(2))}, TypeError, "jitter.apply: expected torch.bool"),
        (
            {"jitter": GOOD._replace(order=GOOD.order[:, :3])},
            ValueError,
            r"jitter.order: expected shape \(2, 4\), got \(2, 3\)",
        ),
        ({"jitter": GOOD._replace(hue=torch.zeros(3))}, ValueError, r"jitter.hue: expected shape \(2,\)"),
        ({"jitter": GOOD._replace(contrast=0.5)}, TypeError, "jitter.contrast: expected a float tensor, got float"),
        ({"grey": torch.zeros(2)}, TypeError, "grey: expected torch.bool"),
        ({"blur_sigma": torch.zeros(2, dtype=torch.int64)}, TypeError, "blur_sigma: expected a float tensor"),
        (
            {"blur_sigma": torch.zeros(2), "max_blur_sigma": 0.0},
            ValueError,
            "max_blur_sigma: expected a finite number above 0",
        ),
        ({"mean": MEAN}, ValueError, "mean, std: expected 3 numbers each"),
        ({"dtype": torch.uint8}, TypeError, "dtype: expected a floating dtype"),
    ],
    ids=range(11),
)
def test_wrong_arguments_raise(change, error, message):
    with pytest.raises(error, match=message):
        fk.shift_flip_jitter(IMAGES, **{"size": (8, 8), **change})
