"""`fastmim record-tokens`: a run that reads the recording has the losses of the run that computes the tokens."""

import pytest
import torch
from safetensors.torch import save_file
from trainer_run import TINY, losses, train, write_images

from fastmim import cli
from fastmim.tokenizer.dalle import DalleEncoder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """(folder of images, tokenizer file)."""
    folder = tmp_path_factory.mktemp("tokens")
    write_images(folder / "images", per_class=6)
    torch.manual_seed(0)
    network = DalleEncoder(width=4, vocabulary=19)
    save_file({n: t.contiguous() for n, t in network.state_dict().items()}, folder / "tokenizer.safetensors")
    return folder / "images", folder / "tokenizer.safetensors"


def test_recorded_tokens_train_as_computed_ones(material, tmp_path, capsys):
    images, tokenizer = material
    run = ["--method", "cae", "--data", str(images), *TINY, "--steps", "3"]
    computed = train([*run, "--cae.tokenizer", str(tokenizer), "--out", str(tmp_path / "computed")])
    assert computed.returncode == 0, computed.stderr

    written = ["--write", str(tmp_path / "tokens"), "--last", "2", *run, "--cae.tokenizer", str(tokenizer)]
    assert cli.run(["record-tokens", *written]) == 0
    assert "tokens of steps 0 to 2" in capsys.readouterr().out
    read = train([*run, "--cae.tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "read")])
    assert read.returncode == 0, read.stderr
    assert losses(tmp_path / "read") == losses(tmp_path / "computed") != []


def test_recording_without_a_tokenizer_is_one_clear_line(material, tmp_path, capsys):
    run = ["--method", "mae", "--data", str(material[0]), *TINY, "--steps", "3"]
    assert cli.run(["record-tokens", "--write", str(tmp_path / "t"), "--last", "2", *run]) == 2
    assert "expected --method cae with --cae.tokenizer FILE, in one process, got mae in 1" in capsys.readouterr().err
