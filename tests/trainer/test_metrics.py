"""Metrics: means without a device read, the file that survives kills, the keys that scripts rely on."""

import json
import math

import pytest
import torch
from PIL import Image
from trainer_run import TINY, metrics

from fastmim.metrics import Clock, Meter, MetricsFile
from fastmim.pictures import GAP_PX, write_pictures
from fastmim.targets import Reconstruction


def test_meter_gives_means_and_starts_anew():
    meter = Meter(torch.device("cpu"))
    for a, b in ((1.0, 4.0), (3.0, 8.0)):
        meter.add(a=torch.tensor(a), b=torch.tensor(b, dtype=torch.bfloat16))
    meter.add(a=torch.tensor(5.0))
    assert meter.read() == {"a": 3.0, "b": 6.0}
    meter.add(a=torch.tensor(True))
    assert meter.read() == {"a": 1.0}


def test_meter_does_not_read_the_device():
    # A tensor on the meta device has no value: any read of it would raise.
    meter = Meter(torch.device("meta"))
    for _ in range(3):
        meter.add(loss=torch.zeros((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()


def test_clock_counts_steps_and_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastmim.metrics.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.steps, clock.waited = 4, 0.5
    now[0] += 2.0
    assert clock.read(batch_size=8) == {"images_per_s": 16.0, "step_ms": 500.0, "data_wait": 0.25}
    assert (clock.steps, clock.waited) == (0, 0.0)


def test_metrics_file_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": math.nan, "name": "x"})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "loss": None, "name": "x"}]  # fmt: skip


def test_run_directory_holds_what_is_promised(images, server, tmp_path):
    out = tmp_path / "run"
    said = server.run(["train", "--method", "cmae", "--data", str(images), *TINY, "--steps", "6", "--log-every", "2",
                       "--save-every", "4", "--knn-every", "3", "--reconstruct-every", "3", "--out", str(out)])  # fmt: skip
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "reconstructions", "encoder.safetensors", ".lock"}  # fmt: skip
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"LATEST", "step-0000004", "step-0000006"}
    assert {p.name for p in (out / "reconstructions").iterdir()} == {"step-0000003.png", "step-0000006.png"}
    records = metrics(out)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [2, 4, 6]
    wanted = {"step", "epoch", "loss", "images_per_s", "step_ms", "data_wait", "lr", "grad_norm", "peak_mib", "loss/pixel",
              "loss/contrast"}  # fmt: skip
    for r in steps:
        assert wanted <= r.keys()
        assert r["loss"] == pytest.approx(r["loss/pixel"] + r["loss/contrast"], rel=1e-5)
        assert 0 <= r["data_wait"] <= 1 and r["peak_mib"] > 1 and r["images_per_s"] > 0
        assert r["images_per_s"] == pytest.approx(8 * 1000 / r["step_ms"], rel=1e-6)
    assert [r["step"] for r in records if "knn_top1" in r] == [0, 3, 6]
    assert "knn_top1_raw_pixels" in records[0]
    for words in ("method ", "engine    single: one process", "loader    folder", "kernels   ", "device    cpu"):
        assert words in said


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (5, "RGB")])
def test_pictures_show_three_columns_per_image(tmp_path, channels, mode):
    parts = [torch.full((2, channels, 112, 120), level) for level in (0.0, 0.5, 1.0)]
    write_pictures(Reconstruction(*parts), tmp_path / "a" / "b.png")
    image = Image.open(tmp_path / "a" / "b.png")
    assert image.mode == mode
    assert image.size == (3 * 120 + 2 * GAP_PX, 2 * 112 + GAP_PX)
    levels = [image.convert("L").getpixel((x * (120 + GAP_PX) + 5, 5)) for x in range(3)]
    assert levels == [0, 128, 255]
