"""Real JPEGs, other channel counts and oblong images train without a special case."""

import zipfile

import numpy as np
import pytest
from safetensors.torch import load_file
from trainer_run import losses, metrics

FEW = ["--preset", "demo", "--precision", "fp32", "--workers", "0", "--device", "cpu", "--log-every", "1", "--lr", "5e-4",
       "--warmup", "0"]  # fmt: skip


@pytest.mark.parametrize("method", ["mae", "cmae"])
def test_cifar10_jpegs_train(server, photographs, tmp_path, method):
    with zipfile.ZipFile(photographs / "cifar10-test.zip") as archive:
        names = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg"))][::10]
        archive.extractall(tmp_path / "cifar", members=names)
    server.run(["train", "--method", method, "--data", str(tmp_path / "cifar"), *FEW, "--image-size", "32", "--patch-size",
                "4", "--batch-size", "32", "--steps", "12", "--out", str(tmp_path / "run")])  # fmt: skip
    values = losses(tmp_path / "run")
    assert sum(values[-3:]) < 0.95 * sum(values[:3])


@pytest.mark.parametrize("method", ["mae", "cmae"])
def test_imagenet_like_photos_train_with_the_paper_preset(server, photographs, tmp_path, method):
    """The published recipe as it is, but for a batch and a length that a CPU can do, and a small encoder."""
    folder = str(photographs / "photos")
    said = server.run(["train", "--method", method, "--data", folder, "--val-data", folder, "--model", "vit_tiny",
                       "--batch-size", "8", "--steps", "2", "--log-every", "1", "--workers", "1", "--out",
                       str(tmp_path / "run")])  # fmt: skip
    assert f"method    {method}, preset paper, vit_tiny/16 at 224 x 224" in said
    assert len(losses(tmp_path / "run")) == 2
    # Each photo's nearest neighbor is itself.
    assert [r["knn_top1"] for r in metrics(tmp_path / "run") if "knn_top1" in r][-1] > 0.9


@pytest.mark.parametrize("method", ["mae", "cmae"])
@pytest.mark.parametrize(("channels", "size"), [(1, ["24"]), (5, ["16", "24"])], ids=["gray", "5-channels-oblong"])
def test_other_channel_counts_train(server, tmp_path, method, channels, size):
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for i in range(10):
        scan = rng.integers(0, 256, (40, 50, channels) if channels > 1 else (40, 50), dtype=np.uint8)
        np.save(tmp_path / "scans" / f"{i}.npy", scan)
    said = server.run(["train", "--method", method, "--data", str(tmp_path / "scans"), *FEW, "--in-chans", str(channels),
                       "--image-size", *size, "--patch-size", "4", "--stem", "patch", "--batch-size", "5", "--steps", "3",
                       "--accumulate", "5" if method == "mae" else "1", "--out", str(tmp_path / "run")])  # fmt: skip
    assert "k-NN      not measured" in said
    weights = load_file(tmp_path / "run" / "encoder.safetensors")
    assert weights["patch_embed.weight"].shape == (128, 16 * channels)
    assert all(np.isfinite(losses(tmp_path / "run")))
