"""`fastmim pack` and `fastmim verify-data`, and training from what they write."""

import contextlib
import os
import subprocess
import sys

import pytest
from trainer_run import TINY, environment, losses, write_images

from fastmim import cli


@pytest.mark.parametrize("to", ["tar", "beton"])
def test_packed_images_train_as_the_folder_does(server, tmp_path, to):
    write_images(tmp_path / "images", per_class=6)
    out = tmp_path / ("shards" if to == "tar" else "images.beton")
    assert cli.run(["pack", str(tmp_path / "images"), str(out), "--to", to, "--workers", "0"]) == 0
    assert cli.run(["verify-data", str(out), "--workers", "0"]) == 0
    for name, data in (("folder", tmp_path / "images"), ("packed", out)):
        server.run(
            ["train", "--method", "mae", "--data", str(data), *TINY, "--steps", "3", "--out", str(tmp_path / name)]
        )
    assert losses(tmp_path / "packed") == losses(tmp_path / "folder") != []


def test_verify_data_names_a_bad_image_and_exits_with_4(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=2)
    bad = tmp_path / "images/class1/000.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    command = ["verify-data", str(tmp_path / "images"), "--workers", "0", "--write-list", str(tmp_path / "bad.txt")]
    assert cli.run(command) == 4
    assert "class1/000.jpg" in capsys.readouterr().out
    assert "class1/000.jpg" in (tmp_path / "bad.txt").read_text()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_terminal_gets_a_bar_and_a_file_gets_lines(tmp_path):
    write_images(tmp_path / "images", per_class=2)
    (tmp_path / "images/class1/000.jpg").write_bytes(b"<html>")
    program = "import sys; from fastmim.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "verify-data", str(tmp_path / "images"), "--workers", "0"]
    lines = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert lines.returncode == 4 and "verify: 100 %" in lines.stdout
    reader, terminal = os.openpty()
    process = subprocess.Popen(command, env=environment(TERM="xterm"), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal shows
        while part := os.read(reader, 4096):
            shown += part
    os.close(reader)
    assert process.wait(60) == 4 and b"6/6" in shown and b"images read" in shown and b"verify: 100 %" not in shown
    assert b"class1/000.jpg" in shown


def test_a_list_of_bad_images_is_left_out_of_training(server, tmp_path):
    write_images(tmp_path / "images", per_class=6)
    bad = [tmp_path / "images" / name for name in ("class0/001.jpg", "class2/005.jpg")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "list").mkdir()
    listed = str(tmp_path / "list/bad.txt")
    assert cli.run(["verify-data", str(tmp_path / "images"), "--workers", "0", "--write-list", listed]) == 4
    said = server.run(["train", "--method", "mae", "--data", str(tmp_path / "images"), *TINY, "--steps", "4", "--out",
                       str(tmp_path / "run"), "--exclude", listed])  # fmt: skip
    assert f"2 of 18 images left out: {tmp_path}/list/bad.txt" in said and "2 per epoch" in said


def test_a_list_of_other_images_is_refused(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=3)
    argv = ["train", "--method", "mae", "--data", str(tmp_path / "images"), *TINY, "--steps", "1", "--dry-run",
            "--exclude"]  # fmt: skip
    for text, message in (
        ("{}", "expected one JSON object with a name per line"),
        ('{"name": "x.jpg"}', "got none of them"),
    ):
        (tmp_path / "list.txt").write_text(text)
        assert cli.run([*argv, str(tmp_path / "list.txt")]) == 2
        assert message in capsys.readouterr().err


def test_an_unknown_resize_is_one_clear_line(tmp_path, capsys):
    write_images(tmp_path / "images", per_class=1)
    argv = ["pack", str(tmp_path / "images"), str(tmp_path / "t"), "--to", "tar", "--resize", "half"]
    assert cli.run(argv) == 2
    assert "--resize: expected max:PIXELS or short:PIXELS, got half" in capsys.readouterr().err
