"""`fastmim record-tokens`: a run that reads the recording has the losses of the run that computes the tokens."""

import pytest
import torch
from safetensors.torch import save_file
from trainer_run import TINY, losses, write_images

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


def test_recorded_tokens_train_as_computed_ones(material, server, tmp_path):
    images, tokenizer = material
    run = ["--method", "cae", "--data", str(images), *TINY, "--steps", "3"]
    server.run(["train", *run, "--cae.tokenizer", str(tokenizer), "--out", str(tmp_path / "computed")])
    write = ["--write", str(tmp_path / "tokens"), "--last", "2", *run, "--cae.tokenizer", str(tokenizer)]
    assert "tokens of steps 0 to 2" in server.run(["record-tokens", *write])
    server.run(["train", *run, "--cae.tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "read")])
    assert losses(tmp_path / "read") == losses(tmp_path / "computed") != []


def test_recording_without_a_tokenizer_is_one_clear_line(material, tmp_path, capsys):
    run = ["--method", "mae", "--data", str(material[0]), *TINY, "--steps", "3"]
    assert cli.run(["record-tokens", "--write", str(tmp_path / "t"), "--last", "2", *run]) == 2
    assert "expected --method cae with --cae.tokenizer FILE, in one process, got mae in 1" in capsys.readouterr().err
