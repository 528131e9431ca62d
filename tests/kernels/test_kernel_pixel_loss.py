"""Reconstruction loss against numpy in float64; gradient against finite differences."""

import fastmim_kernels as fk
import numpy as np
import pytest
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def setup(batch=2, masked=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 24, 36), dtype=torch.uint8, generator=g)
    ids = fk.random_masking(torch.tensor([1, 2]), torch.arange(batch), 6, 6 - masked).ids_masked
    return torch.randn(batch, masked, 192, generator=g).to(dtype), images, ids


def window():
    return {"size": (16, 24), "offset": torch.tensor([[3, 12], [8, 0]]), "flip": torch.tensor([True, False])}


def slow_loss(pred, images, ids, norm, kind, eps=1e-6):
    cut = window()
    total = []
    for b, row in enumerate(ids.tolist()):
        image = images[b].numpy().astype(np.float64) / 255
        image = image[:, :, ::-1] if cut["flip"][b] else image
        top, left = cut["offset"][b].tolist()
        image = (image[:, top : top + 16, left : left + 24] - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        for m, patch in enumerate(row):
            y, x = patch // 3 * 8, patch % 3 * 8
            target = image[:, y : y + 8, x : x + 8].transpose(1, 2, 0).reshape(-1)
            if norm:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + eps)
            d = np.abs(pred[b, m].double().numpy() - target)
            total.append(np.mean({"mse": d * d, "l1": d, "smooth_l1": np.where(d < 1, d * d / 2, d - 0.5)}[kind]))
    return np.mean(total)


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("masked", [1, 5])
def test_masked_pixel_loss_equals_numpy(kind, norm, masked):
    pred, images, ids = setup(masked=masked)
    got = fk.masked_pixel_loss(pred, images, ids, 8, mean=MEAN, std=STD, norm=norm, kind=kind, **window())
    assert got.dtype == torch.float32 and got.ndim == 0
    assert float(got) == pytest.approx(slow_loss(pred, images, ids, norm, kind), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_predictions_are_compared_in_float32(dtype):
    pred, images, ids = setup(dtype=dtype)
    got = fk.masked_pixel_loss(pred, images, ids, 8, mean=MEAN, std=STD, **window())
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(slow_loss(pred.float(), images, ids, True, "mse"), rel=2e-6)


def test_gradient_of_predictions():
    pred, images, ids = setup(batch=1, masked=2, dtype=torch.float64)
    images, ids, pred = images[:, :, :4, :6], ids % 6, pred[:, :, :12].clone().requires_grad_()
    for kind in ("mse", "l1", "smooth_l1"):
        assert torch.autograd.gradcheck(
            lambda p, k=kind: fk.masked_pixel_loss(p, images, ids, 2, mean=MEAN, std=STD, kind=k), pred
        )


def test_target_gets_no_gradient_from_float_images():
    pred, images, ids = setup()
    images = (images / 255).requires_grad_()
    assert not fk.masked_pixel_loss(pred, images, ids, 8, mean=MEAN, std=STD, **window()).requires_grad


def test_zero_prediction_of_normalized_patches_gives_767_768():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1], [2, 3]])
    loss = fk.masked_pixel_loss(torch.zeros(2, 2, 768), images, ids, 16, mean=MEAN, std=STD)
    assert float(loss) == pytest.approx(767 / 768, rel=1e-5)


def test_flat_patches_give_finite_loss_and_gradient():
    pred = torch.zeros(1, 1, 192, requires_grad=True)
    loss = fk.masked_pixel_loss(
        pred, torch.full((1, 3, 8, 8), 200, dtype=torch.uint8), torch.tensor([[0]]), 8, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    loss.backward()
    assert loss.isfinite() and loss < 1e-5 and pred.grad.isfinite().all()


def test_non_contiguous_predictions():
    pred, images, ids = setup()
    wide = torch.stack([pred, pred], -1)[..., 0]
    named = {"mean": MEAN, "std": STD, **window()}
    assert torch.equal(
        fk.masked_pixel_loss(wide, images, ids, 8, **named), fk.masked_pixel_loss(pred, images, ids, 8, **named)
    )


NO_IDS = torch.zeros(2, 0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"ids_masked": NO_IDS, "pred": torch.zeros(2, 0, 192)},
            ValueError,
            "ids_masked: expected at least one masked patch, got shape",
        ),
        (
            {"pred": torch.zeros(2, 6, 192)},
            ValueError,
            r"pred: expected shape \(2, 5, 192\), .* got \(2, 6, 192\); predict the masked",
        ),
        ({"pred": torch.zeros(2, 5, 192).long()}, ValueError, "pred: expected floats on cpu"),
        ({"kind": "mae"}, ValueError, "kind: expected one of mse, l1, smooth_l1, got 'mae'"),
        ({"patch_size": 7}, ValueError, "patch_size: expected a divisor of the image sides 16x24"),
        ({"std": None}, ValueError, "mean, std: expected 3 numbers each"),
        ({"ids_masked": torch.full((2, 5), 15)}, IndexError, "ids_masked: expected patch ids in 0..5"),
    ],
    ids=range(7),
)
def test_wrong_arguments_raise(change, error, message):
    pred, images, ids = setup()
    named = {
        "pred": pred,
        "images": images,
        "ids_masked": ids,
        "patch_size": 8,
        "mean": MEAN,
        "std": STD,
        **window(),
        **change,
    }
    with pytest.raises(error, match=message):
        fk.masked_pixel_loss(**named)


def test_patch_of_one_value_has_no_variance():
    with pytest.raises(ValueError, match="norm: expected patches of at least 2 values, got V = 1"):
        fk.masked_pixel_loss(torch.zeros(1, 1, 1), torch.zeros(1, 1, 2, 2), torch.tensor([[0]]), 1, mean=None, std=None)
