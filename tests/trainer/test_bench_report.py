"""Tables and pictures are made of the lines of results, and docs/benchmarks.md of the files that are there."""

import importlib
import json
import re
import sys

import pytest
from trainer_run import ROOT

MACHINE = {"device": "cpu", "device_type": "cpu", "threads": 1, "torch": "0", "commit": "c"}
CEILING = {"suite": "ceiling", **MACHINE, "matmul_tflops": 1.0, "matmul_fp32_tflops": 0.1, "copy_gb_s": 10.0}
POINT = {"suite": "step", "method": "mae", "model": "vit_base", "image_size": 224, "patch_size": 16, "batch_size": 256,
         "precision": "bf16", **MACHINE, "provider": "ours", "n": 7, "ms": 10.0, "ms_20": 9.0, "ms_80": 12.0,
         "images_per_s": 4050.0, "mfu_measured": 0.123, "loss_error": 0.0, "launches": 5, "host_syncs": 0, "saved_mib": 3.0}  # fmt: skip
KERNEL = {"suite": "kernels", **MACHINE, "function": "gather_tokens", "case": "B8", "setting": "a CPU", "n": 5,
          "ms": {"reference": 4.0, "native": 2.0, "eager": 6.0}, "forward_ms": {"reference": 3.0, "native": 1.0, "eager": 2.0},
          "bytes_moved": 5_000_000, "flops": 0}  # fmt: skip


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module("report")


def test_steps_are_compared_with_ours_and_the_last_measurement_counts(report):
    slow = {**POINT, "provider": "official", "ms": 25.0, "images_per_s": 160.0, "loss_error": 2e-6, "launches": 50}
    missing = {**POINT, "suite": "missing", "provider": "timm", "why": "timm is not installed"}
    text = report.step_report.page(
        [CEILING, {**POINT, "ms": 99.0}, slow, missing, POINT, CEILING | {"matmul_tflops": 0.9, "drift": 0.1}], "f"
    )
    rows = [line for line in text.splitlines() if line.startswith("| mae")]
    case = "| mae vit_base/16 224px b256 bf16"
    assert rows == [f"{case} | ours | 7 | 10.0 | 9.0 | 12.0 | - | - | 1.00x | 0.0e+00 | 5 | 0 | 3 |",
                    f"{case} | official | 7 | 25.0 | 9.0 | 12.0 | - | - | 2.50x | 2.0e-06 | 50 | 0 | 3 |"]  # fmt: skip
    assert "| launches | syncs | saved |\n" in text, "no columns for what was not measured"
    assert "cpu; 1 thread(s); torch 0; commit c; n = 7." in text
    assert (
        "products 1 TFLOP/s, copies 10 GB/s" in text
        and "In 1 of 1 runs they moved by more than 3 %, at most by 10 %" in text
    )
    assert "Not measured: timm for mae (timm is not installed)." in text and "aim" not in text
    assert "Ceilings: not measured." in report.step_report.page([POINT], "f")


def test_speeds_are_shown_of_runs_whose_ceilings_stood_still(report):
    """Three runs of one file: one whose ceilings moved, one that was broken off, a good one; ratios are shown of all."""
    point = {way: {**POINT, "provider": way, "slower": 2.0} for way in ("official", "stock", "timm")}
    records = [CEILING, point["official"], CEILING | {"drift": 0.031}, CEILING, point["stock"], CEILING, point["timm"],
               CEILING | {"drift": 0.03}]  # fmt: skip
    assert {r["provider"]: r["is_void"] for r in report.step_report.steps_of(records)} == {
        "official": True, "stock": True, "timm": False
    }  # fmt: skip
    rows = [line for line in report.step_report.page(records, "f").splitlines() if line.startswith("| mae")]
    assert [("| 4050.0 | 12 % |" in row, "| - | - |" in row, "| 2.00x |" in row) for row in rows] == [
        (False, True, True), (False, True, True), (True, False, True)
    ]  # fmt: skip


def test_pictures_show_speeds_where_they_count(report):
    plt = pytest.importorskip("matplotlib.pyplot")
    slow = {**POINT, "provider": "official", "slower": 2.5, "images_per_s": 160.0}
    for drift, speeds in ((0.1, ["", ""]), (0.02, [", 4050.0 images/s", ", 160.0 images/s"])):
        figure = report.pictures.draw_steps([CEILING, POINT, slow, CEILING | {"drift": drift}], plt)
        (axes,) = figure.axes
        plt.close(figure)
        ways = (" ours 1.00x", " official 2.50x")
        assert [text.get_text() for text in axes.texts] == [way + speed for way, speed in zip(ways, speeds)]


def test_a_page_says_how_its_numbers_were_made(report):
    """The commands, each once; and of how many rows none is known."""
    new = {**POINT, "command": "fastmim bench step --methods mae", "checked": 20, "counted_parts": 2}
    text = report.step_report.page([POINT, new | {"provider": "plain"}, new | {"provider": "official"}], "f")
    assert text.count("- `fastmim bench step --methods mae`") == 1
    assert "Of 1 of 3 rows the command was not recorded." in text
    assert "| loss error | checked | launches | syncs | saved | parts |\n" in text
    assert "| 0.0e+00 | 20 | 5 | 0 | 3 | 2 |" in text and "| 0.0e+00 |  | 5 | 0 | 3 |  |" in text
    assert "not recorded" not in report.step_report.page([new], "f")


def test_what_a_gpu_tells_has_columns_and_ratios_are_those_of_rounds(report):
    gpu = {
        "mfu_datasheet": 0.11,
        "kernels": 700,
        "peak_mib": 9000.4,
        "backend": "triton",
        "first_step_s": 41.26,
        "triton": "3.6.0",
    }
    text = report.step_report.page(
        [POINT, POINT | gpu | {"provider": "stock", "slower": 1.35}, CEILING | {"drift": 0.02}], "f"
    )
    assert "| MFU | of datasheet | slower | loss error | launches | kernels | syncs | saved | peak | first |" in text
    assert "| 12 % | 11 % | 1.35x | 0.0e+00 | 5 | 700 | 0 | 3 | 9000 | 41.3 |" in text
    assert "triton kernels; torch 0; Triton 3.6.0;" in text and "they moved by 2.0 % at most" in text


def test_an_h200_is_held_against_the_aims(report):
    h200 = {"device": "NVIDIA H200"}
    still = CEILING | h200 | {"drift": 0.01}
    text = report.step_report.page([CEILING | h200, POINT | h200, still], "f")
    assert "| mae vit_base/16 224px b256 bf16 | ours | mae | 4050 | 8100 | 12 % | 60 % | 50 % |" in text
    assert "| mae | - | 8100 | - | 60 % | - |" in report.step_report.page([POINT | h200, still | {"drift": 0.1}], "f")


def test_cae_has_an_aim_for_pixels_and_one_for_tokens(report):
    """A record without options is of the paper preset, which has no tokenizer."""
    cae = {**POINT, "device": "NVIDIA H200", "method": "cae", "images_per_s": 2075.0}
    still = CEILING | {"device": "NVIDIA H200", "drift": 0.01}
    text = report.step_report.page([cae, still], "f")
    assert "| ours | cae | 2075 | 4150 | 12 % | 58 % | 50 % |" in text
    assert "58% and 4150 images/s where it predicts pixels, 45% and 2200 with DALL-E's tokenizer" in text
    text = report.step_report.page(
        [cae | {"options": {"tokenizer": "encoder.pkl"}, "images_per_s": 1100.0}, still], "f"
    )
    assert "| ours | cae with DALL-E's tokenizer | 1100 | 2200 | 12 % | 45 % | 50 % |" in text


def test_share_of_the_ceiling_by_hand(report):
    """5 MB at 10 GB/s are 0.5 ms, of 1 ms; 2 GFLOP at 1 TFLOP/s are 2 ms, of 4 ms."""
    product = {
        **KERNEL,
        "function": "linear",
        "flops": 2_000_000_000,
        "forward_ms": {"reference": 4.0},
        "ms": {"reference": 9.0},
    }
    text = report.kernel_report.kernels_page([CEILING, KERNEL, product], "f")
    assert "| gather_tokens | B8 | 5 | 6.00 | 4.00 | 2.00 | 3.0x |  | 50 % |" in text
    assert "| linear | B8 | 5 |  | 9.00 |  |  |  | 50 % |" in text
    assert "cpu; 1 thread(s); torch 0; commit c; n = 5. Ceilings: products 1 TFLOP/s" in text
    assert "|  |\n" in report.kernel_report.kernels_page([KERNEL], "f"), "no ceilings, no share"


def test_every_suite_has_a_page_and_a_picture(report, tmp_path):
    loader = {"suite": "loader", "data": "photos", "loader": "Pillow + DataLoader", "cpu_ms": [1.0], "images_per_s": [9.0],
              "images": 8, "machine": "m", "versions": "v", "decoder": "d", "commit": "c", "date": "t",
              "command": "python bench/bench_loader.py"}  # fmt: skip
    run = {"suite": "e2e", **MACHINE, "data": "photos", "flags": ["--method", "mae"], "steps": 9, "source": "real", "n": 3,
           "images_per_s": 90.0, "data_wait": 0.01}  # fmt: skip
    gpu = {"suite": "gpu kernels", "op": "gather", "case": "B8", "function": "gather_tokens", "device": "g", "torch": "0",
           "providers": {"triton": {"forward_ms": 1.0, "both_ms": 2.0, "forward_launched_ms": 1.5}, "eager": {"error": "x"}},
           "copy_gb_s": 4.0, "gb_s": 2.0}  # fmt: skip
    product = {**KERNEL, "flops": 2_000_000_000}
    profile = {**POINT, "suite": "profile", "top": [{"name": "mm", "calls": 3.0, "ms": 1.5, "share": 0.5}], "step_ms": 4.0,
               "kinds": {"norms": 1.0, "products": 2.0}, "products_tflops": 0.25}  # fmt: skip
    plain = {**profile, "provider": "plain", "kinds": {"norms": 9.0}}
    check = {"suite": "check", "op": "gather", "cases": 7, "wrong": 1, "device": "g", "torch": "0"}
    engine = {"suite": "engines", **MACHINE, "case": "mae b8", "engine": "single", "n": 6, "ms": 70.0, "ratio": 1.0}
    files = {
        "steps": ([CEILING, POINT], "| ours |"), "kernels": ([CEILING, product], "| gather_tokens |"),
        "loaders": ([loader], "| 1.00 (1.00..1.00) |"), "gpu": ([gpu], "| 2 | 50 % | 1.000 / 2.000 (1.500) | error |"),
        "e2e": ([run, {**run, "source": "synthetic", "images_per_s": 100.0}], "| 90 | 100 | 90 % | 1.0 % |"),
        "profiles": ([profile], "| 50.0 % | 1.500 | 3 | `mm` |"), "engines": ([engine], "| single | 70 | 1.000 |"),
        "ways": ([profile, plain], "| ours | plain |\n|---|---|---|\n| norms | 1.00 | 9.00 |\n| products | 2.00 | 0.00 |\n| all | 3.00"),
        "checks": ([check], "| gather | 7 | 1 |"),
    }  # fmt: skip
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    for name, (records, words) in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        with open(path, "a") as file:
            file.write('{"torn')
        report.write_report(path)
        assert words in path.with_suffix(".md").read_text(), name
        if has_matplotlib and name in ("steps", "kernels", "loaders", "gpu"):
            assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG"), name
    text = report.document(tmp_path)
    assert "- `python bench/bench_loader.py`\n" in (tmp_path / "loaders.md").read_text()
    assert "![steps](benchmarks/steps.png)" in text and "## Training steps: `steps.jsonl`" in text
    assert "\n### cpu, 1 thread(s)\n" in text


def test_the_page_is_made_of_the_files_that_are_there(report):
    text = report.DOCUMENT.read_text()
    assert text == report.document(report.RESULTS), "python bench/report.py"
    for picture in re.findall(r"\]\((benchmarks/[^)]*)\)", text):
        assert (report.DOCUMENT.parent / picture).is_file(), f"{picture}: python bench/report.py, with matplotlib"


def test_tables_beside_the_files_are_made_of_them(report):
    for path in sorted(report.RESULTS.rglob("*.jsonl")):
        suite, records = report.read(path)
        text = path.with_suffix(".md").read_text()
        assert text == report.PAGES[suite](records, path.name), f"python bench/report.py {path}"


def test_legends_cover_nothing(report):
    """As matplotlib lays the loaders out: the legend is below all else. (What is saved is cut to what is drawn.)"""
    plt = pytest.importorskip("matplotlib.pyplot")
    records = [
        {"suite": "loader", "data": data, "loader": f"a loader with a long name, number {i}", "cpu_ms": [9.0 - i], "images_per_s": [9.0],
         "images": 8, "machine": "m", "versions": "v " * 90, "decoder": "d", "commit": "c", "date": "t"}
        for data in ("photos", "drawn") for i in range(5)
    ]  # fmt: skip
    figure = report.pictures.draw_loaders(records, plt)
    figure.canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    plt.close(figure)
    assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0
    assert len(legend.get_texts()) == 2 and len(axes.get_yticklabels()) == 10
