"""k-NN accuracy against a slow vote, over ranks, and through the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_run import TINY

from fastmim import cli, dist
from fastmim.evaluate.knn import NEIGHBORS, TEMPERATURE, extract, raw_pixels, top1


def slow_top1(train, train_labels, val, val_labels) -> float:
    right = 0
    for v, label in zip(val.double(), val_labels.tolist()):
        cosine = [(torch.dot(v, t) / (v.norm() * t.norm())).item() for t in train.double()]
        votes: dict[int, float] = {}
        for i in sorted(range(len(cosine)), key=lambda i: -cosine[i])[:NEIGHBORS]:
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0) + float(
                torch.tensor(cosine[i] / TEMPERATURE).exp()
            )
        right += max(votes, key=votes.get) == label
    return right / len(val)


@pytest.mark.parametrize(("n", "m", "d", "classes"), [(97, 31, 7, 4), (5, 9, 3, 2), (40, 1030, 5, 3)])
def test_top1_equals_a_slow_vote(n, m, d, classes):
    g = torch.Generator().manual_seed(n)
    centers = torch.randn(classes, d, generator=g)
    labels, val_labels = torch.randint(classes, (n,), generator=g), torch.randint(classes, (m,), generator=g)
    x = centers[labels] + torch.randn(n, d, generator=g)
    v = centers[val_labels] + torch.randn(m, d, generator=g)
    assert top1(x, labels, v, val_labels) == pytest.approx(slow_top1(x, labels, v, val_labels), abs=1e-9)


def test_top1_of_perfect_and_of_useless_features():
    labels = torch.arange(300) % 10
    one_hot = torch.nn.functional.one_hot(labels).float()
    assert top1(one_hot, labels, one_hot, labels) == 1.0
    assert top1(one_hot, labels, one_hot, (labels + 1) % 10) == 0.0


def test_raw_pixels_are_standardized_thumbnails():
    images = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = raw_pixels(images)
    assert rows.shape == (3, 3 * 24 * 24)
    assert rows.mean(1).abs().max() < 1e-5
    assert torch.allclose(rows.std(1), torch.ones(3), atol=1e-5)
    assert raw_pixels(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8)).isfinite().all()


@pytest.fixture(scope="module")
def run_folder(images, server, tmp_path_factory):
    out = tmp_path_factory.mktemp("knn") / "run"
    server.run(["train", "--method", "cmae", "--data", str(images), *TINY, "--steps", "2", "--out", str(out)])
    return out


def folders(images: Path) -> list[str]:
    return [
        *("--data", str(images / "train"), "--val-data", str(images / "val")),
        *("--precision", "fp32", "--workers", "0"),
    ]


def printed(capsys, *argv: str) -> str:
    assert cli.run(list(argv)) == 0
    return capsys.readouterr().out.split("%")[0]


def test_command_reads_run_checkpoint_and_encoder_alike(run_folder, images, capsys):
    where = folders(images)
    checkpoint = next((run_folder / "checkpoints").glob("step-*"))
    said = {
        printed(capsys, "knn", str(p), *where) for p in (run_folder, checkpoint, run_folder / "encoder.safetensors")
    }
    assert len(said) == 1
    assert 0 <= float(said.pop().split()[-1]) <= 100
    assert printed(capsys, "knn", str(run_folder), *where, "--raw") != printed(
        capsys, "knn", str(run_folder), *where, "--limit", "1"
    )


def test_exported_encoder_is_the_checkpoint_encoder_and_describes_itself(run_folder):
    from fastmim.export import load_encoder

    weights = load_file(run_folder / "encoder.safetensors")
    newest = run_folder / "checkpoints" / (run_folder / "checkpoints" / "LATEST").read_text().strip()
    inside = load_file(newest / "model.safetensors")
    assert weights and all(tensor.equal(inside[f"encoder.{name}"]) for name, tensor in weights.items())
    encoder = load_encoder(run_folder / "encoder.safetensors")
    assert (encoder.model.name, encoder.model.patch_size, encoder.design["position"]) == ("vit_pico", 4, "row")
    other = load_encoder(run_folder)
    assert encoder.position.equal(other.position)


def test_encoder_with_a_conv_stem_is_read_back_alike(images, server, tmp_path, capsys):
    out = tmp_path / "run"
    server.run(["train", "--method", "cmae", "--data", str(images), *TINY, "--stem", "conv", "--steps", "1", "--out",
                str(out)])  # fmt: skip
    where = folders(images)
    assert printed(capsys, "knn", str(out), *where) == printed(capsys, "knn", str(out / "encoder.safetensors"), *where)


def test_linear_probe_command_names_its_weight_decay(run_folder, tmp_path, capsys):
    from fastmim_pipelines.demo import write_demo

    write_demo(tmp_path / "demo", images=30, val_images=10, workers=0, progress=lambda line: None)
    where = ["--data", str(tmp_path / "demo/train"), "--val-data", str(tmp_path / "demo/val"), "--workers", "0"]
    assert cli.run(["linear", str(run_folder), *where, "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("linear probe top-1: ") and "10 validation images, 30 training images), weight decay" in said
    assert cli.run(["linear", str(run_folder), *where, "--raw"]) == 0


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None], ids=["empty", "text", "foreign"])
def test_foreign_encoder_file_is_refused(tmp_path, content, capsys):
    path = tmp_path / "encoder.safetensors"
    if content is None:
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    assert cli.run(["knn", str(path), "--data", "a", "--val-data", "b"]) == 2
    assert str(path) in capsys.readouterr().err


def assert_shares_are_gathered() -> None:
    """In each process of a job: features of a share of the images, which all processes then have."""
    device = torch.device("cpu")
    dist.start(device)
    images, labels = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), torch.arange(7) + 10
    mine = slice(0, 4) if dist.rank() == 0 else slice(4, 7)
    x, y = extract(lambda i: i.float().flatten(1), [(images[mine], labels[mine], labels[mine])], device)
    assert x.flatten().tolist() == list(range(7)) and y.tolist() == list(range(10, 17)), (x, y)
    dist.finish()


def test_features_of_two_ranks_are_those_of_one(server):
    """Shares of unequal length are gathered in order, without the padding."""
    server.run(["--call", "test_knn", "assert_shares_are_gathered"], world=2)
