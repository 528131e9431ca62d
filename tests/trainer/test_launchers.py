"""Every launcher, engine and number of processes computes the same thing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from storm import last_checkpoint
from trainer_run import TINY, losses, metrics, train

STEPS, LR = 4, 2e-5


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    return ["--data", str(images), *TINY, "--lr", str(LR), "--steps", str(STEPS), "--out", str(out), *extra]


@pytest.fixture(scope="module")
def expected(images, server, tmp_path_factory) -> dict[str, Path]:
    """Runs of one plain process, by their flags."""
    found, folder = {}, tmp_path_factory.mktemp("plain")
    for flags in ("--method cmae", "--method mae", "--method mae --clip 0.5"):
        found[flags] = folder / flags
        server.run(["train", *arguments(images, found[flags], *flags.split())])
    return found


def test_clipping_changes_the_run(expected):
    clipped, plain = (losses(expected[flags]) for flags in ("--method mae --clip 0.5", "--method mae"))
    assert clipped != pytest.approx(plain, rel=2e-5)


def assert_same_results(out: Path, expected: Path) -> None:
    """The losses, the encoder, a picture, and k-NN at start and end."""
    assert losses(out) == pytest.approx(losses(expected), rel=2e-6)
    ours, theirs = (load_file(o / "encoder.safetensors") for o in (out, expected))
    weights = load_file(last_checkpoint(out) / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(weights[f"encoder.{name}"].equal(ours[name]) for name in ours)
    # A step moves each weight by the learning rate: what differs is far below one. Not nothing: where a gradient is
    # nothing but rounding, as for the bias of keys, AdamW steps by its sign.
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert float(difference.norm()) < 0.05 * LR * len(difference) ** 0.5
    assert len(list((out / "reconstructions").glob("*.png"))) == 1
    assert len([r for r in metrics(out) if "knn_top1" in r]) == 2


@pytest.mark.parametrize(
    ("flags", "launcher", "processes", "how"),
    [
        ("--method cmae", "deepspeed", 1, "--engine single"),
        ("--method cmae", "torchrun", 2, ""),
        ("--method mae --clip 0.5", "deepspeed", 2, "--zero 2 --accumulate 2"),
    ],
)
def test_a_launcher_gives_the_results_of_one_plain_process(images, expected, tmp_path, flags, launcher, processes, how):
    done = train(arguments(images, tmp_path / "run", *flags.split(), *how.split()), launcher, processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_results(tmp_path / "run", expected[flags])


@pytest.mark.parametrize(
    ("flags", "world", "how"),
    [
        ("--method cmae", 2, "--zero 0"),
        ("--method cmae", 2, "--zero 1"),
        ("--method cmae", 2, "--zero 2"),
        ("--method cmae", 2, "--zero 3 --accumulate 2"),
        ("--method cmae", 1, "--zero 3 --zero-offload all"),
        ("--method cmae", 1, "--engine ddp --accumulate 4"),
        ("--method mae", 2, "--accumulate 2"),
        ("--method mae", 1, "--zero 1 --zero-offload optimizer --accumulate 4"),
    ],
)
def test_an_engine_gives_the_results_of_one_plain_process(images, server, expected, tmp_path, flags, world, how):
    server.run(["train", *arguments(images, tmp_path / "run", *flags.split(), *how.split())], world=world)
    assert_same_results(tmp_path / "run", expected[flags])
