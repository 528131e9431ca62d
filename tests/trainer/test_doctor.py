"""`fastmim doctor`: every stage is measured, and the one that is slow is named with what helps."""

import numpy as np
import pytest
from PIL import Image
from trainer_run import TINY, write_images

from fastmim import cli
from fastmim.doctor import Facts, Rates, verdict

FAST = Rates(
    disk=5e3, cache=5e4, decode=4e3, resize=1e4, loader=3e3, transfer=None, step=1e3, together=9e2, waiting=0.01
)
PLAIN = Facts(
    is_native=True, is_packed=False, fits_memory=True, has_gpu=False, mean_side_px=430, crop_side_px=224
)  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "facts", "bottleneck", "advice"),
    [
        ({}, {}, "the model", "3.0 times as fast"),
        ({"disk": 500.0}, {}, "the model", "the first epoch reads from the disk"),
        ({"disk": 500.0}, {"fits_memory": False}, "the disk", "--to tar"),
        ({"disk": 500.0}, {"fits_memory": False, "is_packed": True}, "the disk", "--resize max:500"),
        ({"disk": None, "waiting": 0.4, "decode": 300.0}, {}, "decoding", "--resize max:500 --quality 90"),
        ({"waiting": 0.4, "decode": 300.0}, {"is_native": False}, "decoding", "Pillow decodes"),
        ({"waiting": 0.4, "decode": 300.0}, {"mean_side_px": 3000}, "decoding", "--resize short:258"),
        ({"waiting": 0.4, "decode": 300.0}, {"has_gpu": True}, "decoding", "--loader dali or nvimgcodec"),
        ({"waiting": 0.4, "resize": 300.0}, {}, "resizing", "more cores"),
        ({"waiting": 0.4, "cache": 900.0}, {}, "reading files", "few large files"),
        ({"waiting": 0.4, "transfer": 200.0}, {"has_gpu": True}, "the way to the GPU", "PCIe"),
    ],
    ids=str,
)
def test_verdict_names_what_is_slow_and_what_helps(rates, facts, bottleneck, advice):
    found, lines = verdict(FAST._replace(**rates), PLAIN._replace(**facts))
    assert found.startswith(bottleneck) and any(advice in line for line in lines)
    assert all("\n" not in line for line in [found, *lines])


def stages(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line}


@pytest.mark.parametrize("to", ["folder", "tar", "beton"])
def test_doctor_measures_every_stage_and_passes_over_bad_images(tmp_path, capsys, to):
    data = write_images(tmp_path / "images", per_class=8)
    (data / "class0/000.jpg").write_bytes(b"<html>")
    (data / "class1/000.jpg").write_bytes(b"")
    if to != "folder":
        out = tmp_path / ("shards" if to == "tar" else "x.beton")
        assert cli.run(["pack", str(data), str(out), "--to", to, "--workers", "0"]) == 0
        data = out
    capsys.readouterr()
    assert cli.run(["doctor", str(data), "--method", "mae", *TINY, "--seconds", "0.05"]) == 0
    found = stages(capsys.readouterr().out)
    for name in ("disk", "cache", "decode", "resize", "loader", "step", "together"):
        assert " images/s  " in found[name] or (name == "disk" and "not measured" in found[name]), found[name]
        assert "images/s" not in found[name] or float(found[name].split()[1]) > 0
    assert "none" in found["transfer"] and "bottleneck" in found and "advice" in found


def test_doctor_finds_that_large_pictures_hold_a_small_model_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (900, 1200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.jpg", quality=90)
    assert cli.run(["doctor", str(tmp_path / "images"), "--method", "mae", *TINY, "--seconds", "0.3"]) == 0
    out = capsys.readouterr().out
    assert stages(out)["bottleneck"].split(maxsplit=1)[1] == "decoding", out
    assert "advice      Pillow decodes; " in out
    assert "advice      the images are 1039 px on average, the crops 16: fastmim pack --resize short:18" in out, out


def test_doctor_says_what_it_cannot_do(tmp_path, capsys, monkeypatch):
    data = write_images(tmp_path / "images", per_class=1)
    assert cli.run(["doctor", str(data), "--method", "mae", *TINY, "--loader", "synthetic"]) == 2
    assert "doctor: expected images, got --loader synthetic" in capsys.readouterr().err
    for path in data.rglob("*.jpg"):
        path.write_bytes(b"<html>")
    assert cli.run(["doctor", str(data), "--method", "mae", *TINY, "--seconds", "0.05"]) == 4
    assert "not one of" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "_fail", lambda error, code: (_ for _ in ()).throw(error))  # it would end the process
    with pytest.raises(Exception, match="doctor: expected one process, got 2"):
        cli.run(["doctor", str(data), "--method", "mae", *TINY])
