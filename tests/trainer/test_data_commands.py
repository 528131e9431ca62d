"""`fastmim pack` and `fastmim verify-data`, and training from what they write."""

import pytest
from trainer_run import TINY, losses, train, write_images

from fastmim import cli


@pytest.mark.parametrize("to", ["tar", "beton"])
def test_packed_images_train_as_the_folder_does(tmp_path, to):
    write_images(tmp_path / "images", per_class=6)
    out = tmp_path / ("shards" if to == "tar" else "images.beton")
    assert cli.run(["pack", str(tmp_path / "images"), str(out), "--to", to, "--workers", "0"]) == 0
    assert cli.run(["verify-data", str(out), "--workers", "0"]) == 0
    for name, data in (("folder", tmp_path / "images"), ("packed", out)):
        done = train(["--method", "mae", "--data", str(data), *TINY, "--steps", "3", "--out", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "packed") == losses(tmp_path / "folder") != []


def test_verify_data_names_a_bad_image_and_exits_with_4(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=2)
    bad = tmp_path / "images/class1/000.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(SystemExit) as stopped:
        cli.run(["verify-data", str(tmp_path / "images"), "--workers", "0", "--write-list", str(tmp_path / "bad.txt")])
    assert stopped.value.code == 4
    assert "class1/000.jpg" in capsys.readouterr().out
    assert "class1/000.jpg" in (tmp_path / "bad.txt").read_text()


def test_an_unknown_resize_is_one_clear_line(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=1)
    argv = ["pack", str(tmp_path / "images"), str(tmp_path / "t"), "--to", "tar", "--resize", "half"]
    assert cli.run(argv) == 2
    assert "--resize: expected max:PIXELS or short:PIXELS, got half" in capsys.readouterr().err
