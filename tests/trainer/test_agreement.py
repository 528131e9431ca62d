"""Processes that were not started alike: settled with one line on all of them, before any waits for another."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastmim_pipelines.spec import DataError
from trainer_run import TINY, losses

from fastmim.agreement import agreed, judge
from fastmim.arguments import parse_train
from fastmim.config import ConfigError


def arguments(images: Path, out: Path, *extra: str) -> list[str]:
    return ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--lr", "1e-5", "--steps", "6", "--out",
            str(out), *extra]  # fmt: skip


def run_my_own(commands: str) -> None:
    """In each process of a job: the command of its rank."""
    from fastmim.cli import run

    sys.exit(run(json.loads(commands)[int(os.environ["RANK"])]))


@pytest.fixture
def run(server):
    """Runs one process per command, which all shall end with `code`; returns what they said."""

    def run(*commands: list[str], code: int = 0, **env: str) -> str:
        call = ["--call", "test_agreement", "run_my_own", json.dumps(commands)]
        return server.run(call, world=len(commands), code=code, **env)

    return run


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["--zero", "2"], "--zero: expected None on rank 1, as on rank 0, got 2; start all processes with the same"),
        (["--data", "/nowhere"], r"rank 1 on .+: .*/nowhere"),
    ],
    ids=["other engine", "no data"],
)
def test_a_process_that_was_started_otherwise_is_named_and_ends_all(images, run, tmp_path, own, words):
    both = arguments(images, tmp_path / "run")
    said = run(both, [*both, *own], code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(words, errors[0]), said
    assert not (tmp_path / "run").exists()


class Listed(list):
    """The least of an index of images."""

    def name(self, index: int) -> str:
        return self[index]


def made(config, choice=("ddp", 0, "none"), names=("a/1", "a/2")) -> SimpleNamespace:
    """What a session has made of its options, its memory and its images."""
    return SimpleNamespace(config=config, choice=choice, train_index=None if names is None else Listed(names))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([], ""),
        (["--data", "data/b", "--workers", "3", "--out", "b"], ""),  # each host's own affair
        (["--batch-size", "12"], "--batch-size: expected 8 on rank 2, as on rank 0, got 12"),
        (["--mae.mask-ratio", "0.9"], "--mae.mask-ratio: expected 0.75 on rank 2, as on rank 0, got 0.9"),
        (["--resume"], "--resume: expected None on rank 2, as on rank 0, got latest"),
        (["--tracker", "wandb"], "--tracker: expected None on rank 2, as on rank 0, got wandb"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_must_be_the_same_on_all_ranks(monkeypatch, own, words):
    """Rank 2 of three was started with words of its own."""
    both = arguments(Path("data"), Path("a"), "--mae.mask-ratio", "0.75")[1:]
    texts: list[str] = []
    monkeypatch.setattr("fastmim.dist.judged_by_rank_0", lambda name, text, judge: texts.append(text))
    for argv in (both, both, [*both, *own]):
        agreed(lambda argv=argv: made(parse_train(argv)))
    monkeypatch.setattr("fastmim.dist.judged_by_rank_0", lambda name, text, judge: judge(texts))
    if words:
        with pytest.raises(ConfigError, match=re.escape(words)):
            agreed(lambda: made(parse_train(both)))
    else:
        assert agreed(lambda: made(parse_train(both))).choice[0] == "ddp"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"choice": ("zero", 2, "none", "why")}, {"choice": ("zero", 3, "none", "why")},
         "the engine chosen: expected ('zero', 2, 'none') on rank 1, as on rank 0, got ('zero', 3, 'none'); start all"),
        ({"names": ["a/1", "a/2", "b/1"]}, {"names": ["a/1", "b/1"]}, "the images found: expected 3 (names "),
        ({"names": ["a/1", "a/2"]}, {"names": ["a/1", "a/\udcff"]}, "the images found: expected 2 (names "),
        ({"names": None}, {"names": ["a/1"]}, "the images found: expected none on rank 1, as on rank 0, got 1 (names "),
    ],
    ids=["memory", "missing image", "other image", "no images"],
)  # fmt: skip
def test_what_hosts_find_must_be_the_same(monkeypatch, first, second, words):
    config = parse_train(arguments(Path("data"), Path("a"))[1:])
    texts: list[str] = []
    monkeypatch.setattr("fastmim.dist.judged_by_rank_0", lambda name, text, judge: texts.append(text))
    for each in (first, second):
        agreed(lambda each=each: made(config, **each))
    assert judge([texts[0]] * 3) == "" and json.loads(judge(texts))["problem"].startswith(words)


def test_the_first_problem_keeps_its_exit_code_on_all_ranks(monkeypatch):
    texts: list[str] = []
    monkeypatch.setattr("fastmim.dist.launched_world", lambda: 2)
    monkeypatch.setattr("fastmim.dist.from_rank_0", lambda name, text: text)
    monkeypatch.setattr("fastmim.dist.judged_by_rank_0", lambda name, text, judge: texts.append(text))

    def fail():
        raise DataError("an image")

    assert agreed(lambda: made(parse_train(arguments(Path("data"), Path("a"))[1:]))) and agreed(fail) is None
    monkeypatch.setattr("fastmim.dist.judged_by_rank_0", lambda name, text, judge: judge(texts))
    with pytest.raises(ConfigError, match=r"^rank 1 on .+: an image$") as raised:
        agreed(fail)
    assert raised.value.exit_code == 4
    with pytest.raises(ZeroDivisionError):  # a defect is no verdict
        agreed(lambda: 1 / 0)


def test_what_only_rank_0_may_know_ends_all_of_them(images, run, tmp_path):
    """The folder of the run is on its host alone, and its config is damaged."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("- not\n- settings\n")
    said = run(*(arguments(images, tmp_path / side, "--resume") for side in "ab"), code=2)
    assert said.count("error: ") == 1 and "`name: value` lines" in said, said


@pytest.mark.parametrize(
    "method",
    [
        ["--mae.decoder-width", "32"],
        # Moves its crops at step 4, to boxes that a checkpoint has and the second host cannot read.
        ["--icmae.head-hidden", "32", "--icmae.head-out", "16", "--icmae.decoder-width", "32"],
    ],
    ids=["mae", "icmae"],
)
def test_a_run_goes_on_as_rank_0s_folder_says(images, run, tmp_path, method):
    """Hosts with folders of their own: what the first command said, and what was saved, is on the first host alone."""
    name = method[0][2:].partition(".")[0]

    def both(*extra: str) -> list[list[str]]:
        base = ["--method", name, *method, "--steps", "8", "--save-every", "1"]
        sides = (("a", images), ("b", tmp_path / "images"))
        return [arguments(folder, tmp_path / side, *base, *extra) for side, folder in sides]

    shutil.copytree(images, tmp_path / "images")
    first = ["--zero", "2", "--seed", "5"]
    run(*both(*first), code=75, FASTMIM_FAULT="step:optimizer:term@5")
    said = run(*both("--resume"))
    assert "ZeRO stage 2" in said and re.search("resumed at step [56] of 8", said)
    assert not (tmp_path / "b").exists()
    run(*both(*first, "--out", str(tmp_path / "straight")))
    assert len(losses(tmp_path / "a")) == 8 and losses(tmp_path / "a") == losses(tmp_path / "straight")


def test_one_process_agrees_with_itself():
    with pytest.raises(ConfigError, match="its own words"):
        agreed(lambda: (_ for _ in ()).throw(ConfigError("its own words")))
