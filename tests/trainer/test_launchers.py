"""Every launcher, engine and number of processes computes the same thing, in real processes."""

import pytest
from trainer_run import TINY, losses, metrics, train

STEPS = 4
REFERENCE: dict[tuple[str, str], list[float]] = {}


def reference(images, folder, method: str) -> list[float]:
    """Losses of one plain process."""
    if method not in REFERENCE:
        out = folder / f"reference-{method}"
        done = train(["--method", method, "--data", str(images), *TINY, "--steps", str(STEPS), "--out", str(out)])
        assert done.returncode == 0, done.stderr
        REFERENCE[method] = losses(out)
    return REFERENCE[method]


CASES = [
    # (method, launcher, processes, arguments)
    ("cmae", "deepspeed", 1, ["--engine", "single"]),
    ("cmae", "deepspeed", 2, ["--zero", "0"]),
    ("cmae", "deepspeed", 2, ["--zero", "1"]),
    ("cmae", "torchrun", 2, []),
    ("cmae", "torchrun", 2, ["--zero", "2"]),
    ("cmae", "torchrun", 2, ["--zero", "3", "--accumulate", "2"]),
    ("cmae", "python", 1, ["--zero", "3"]),
    ("cmae", "python", 1, ["--engine", "ddp", "--accumulate", "4"]),
    ("mae", "torchrun", 2, ["--accumulate", "2"]),
    ("mae", "deepspeed", 2, ["--zero", "2", "--accumulate", "2", "--clip", "0.5"]),
    ("mae", "python", 1, ["--zero", "1", "--accumulate", "4"]),
]


@pytest.mark.parametrize(
    ("method", "launcher", "processes", "arguments"), CASES,
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, list) else str(value),
)  # fmt: skip
def test_engine_gives_the_losses_of_one_plain_process(images, tmp_path_factory, method, launcher, processes, arguments):
    folder = tmp_path_factory.mktemp("engine")
    expected = reference(images, tmp_path_factory.getbasetemp(), method)
    if "--clip" in arguments:
        plain = folder / "clipped"
        done = train(["--method", method, "--data", str(images), *TINY, "--steps", str(STEPS), "--out", str(plain),
                      "--clip", "0.5"])  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert losses(plain) != pytest.approx(expected, rel=2e-5), "clipping at 0.5 must change this run"
        expected = losses(plain)
    out = folder / "run"
    base = ["--method", method, "--data", str(images), *TINY, "--steps", str(STEPS), "--out", str(out)]
    done = train([*base, *arguments], launcher, processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == pytest.approx(expected, rel=2e-6)
    assert (out / "encoder.safetensors").is_file()
    assert len(list((out / "reconstructions").glob("*.png"))) == 1
    assert len([r for r in metrics(out) if "knn_top1" in r]) == 2  # start and end
