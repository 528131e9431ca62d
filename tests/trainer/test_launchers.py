"""Every launcher, engine and number of processes computes the same thing."""

from pathlib import Path

import pytest
from trainer_run import TINY, losses, metrics, train

STEPS = 4


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    return ["--data", str(images), *TINY, "--steps", str(STEPS), "--out", str(out), *extra]


@pytest.fixture(scope="module")
def expected(images, server, tmp_path_factory) -> dict[str, list[float]]:
    """Losses of one plain process, by its flags."""
    found, folder = {}, tmp_path_factory.mktemp("plain")
    for flags in ("--method cmae", "--method mae", "--method mae --clip 0.5"):
        server.run(["train", *arguments(images, folder / flags, *flags.split())])
        found[flags] = losses(folder / flags)
    return found


def test_clipping_changes_the_run(expected):
    assert expected["--method mae --clip 0.5"] != pytest.approx(expected["--method mae"], rel=2e-5)


def assert_same_results(out: Path, expected: list[float]) -> None:
    """The losses, an encoder, a picture, and k-NN at start and end."""
    assert losses(out) == pytest.approx(expected, rel=2e-6)
    assert (out / "encoder.safetensors").is_file()
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
        ("--method cmae", 1, "--zero 3"),
        ("--method cmae", 1, "--engine ddp --accumulate 4"),
        ("--method mae", 2, "--accumulate 2"),
        ("--method mae", 1, "--zero 1 --accumulate 4"),
    ],
)
def test_an_engine_gives_the_results_of_one_plain_process(images, server, expected, tmp_path, flags, world, how):
    server.run(["train", *arguments(images, tmp_path / "run", *flags.split(), *how.split())], world=world)
    assert_same_results(tmp_path / "run", expected[flags])
