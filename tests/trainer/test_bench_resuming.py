"""Every benchmark goes on, point by point, where it was killed: nothing is lost, nothing is measured twice."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from trainer_run import ROOT


@pytest.fixture
def bench(monkeypatch):
    """name -> module of the bench folder."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module


def test_a_torn_line_is_dropped_and_whole_ones_are_kept(bench, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    points = bench("points").Points(path)
    points.add([{"a": 3}])
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert points.has(lambda r: r["a"], 3) and not points.has(lambda r: r["a"], 4)
    path.write_text('{"a": ')
    assert bench("points").Points(path).records == [] and path.read_text() == ""
    path.write_text('{"a": 1}')
    assert bench("points").Points(path).records == [{"a": 1}] and path.read_text() == '{"a": 1}\n', "its end alone"


def test_steps_go_on_after_a_kill(tmp_path):
    path = tmp_path / "steps.jsonl"
    command = [
        sys.executable, str(ROOT / "bench" / "bench_step.py"), "--json", str(path), "--methods", "mae", "icmae", "simmim",
        "--models", "vit_pico", "--batch-sizes", "4", "--image-size", "32", "--patch-size", "8", "--precisions", "fp32",
        "--rounds", "3", "--checked", "1", "--seconds", "5", "--providers", "ours",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "pipelines"))}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (path.exists() and '"step"' in path.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline, "no point was measured"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    kept = before[: before.rfind("\n") + 1]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith(kept) and "in the file already" in done.stdout
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(r["method"] for r in records if r["suite"] == "step") == ["icmae", "mae", "simmim"]
    assert path.with_suffix(".md").read_text().count("| ours |") == 3


def test_kernels_leave_out_what_the_file_has(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMIM_BENCH_SHORT", "1")
    kernels = bench("bench_kernels")
    op, case, device = next(p.values for p in kernels.RUNS if p.values[0] == "masks")
    monkeypatch.setattr(kernels, "CALLS", 3)
    path, told = tmp_path / "kernels.jsonl", []
    kernels.bench_op(op, case, device, kernels.Points(path), monkeypatch, lambda *args: told.append(args))
    (record,) = kernels.Points(path).records
    assert record["n"] == 3 and record["ms"]["reference"] > 0 and record["function"] == case.function
    ((seconds, ways),) = told
    assert len(seconds) == 3 and ways["reference"] == pytest.approx(record["ms"]["reference"] / 1e3)
    with pytest.raises(pytest.skip.Exception, match="has it already"):
        kernels.bench_op(op, case, device, kernels.Points(path), monkeypatch, None)


@pytest.fixture
def kernels(bench, monkeypatch):
    """On CPU tensors, where native kernels take Triton's place."""
    monkeypatch.setenv("FASTMIM_KERNELS", "reference")
    found = bench("gpu_kernels")
    if not found.has_ours("gather"):
        pytest.skip("the native kernels are not built")
    return found


def test_gpu_kernels_leave_out_what_the_file_has(kernels, tmp_path, capsys):
    path = tmp_path / "checks.jsonl"
    for _ in range(2):
        assert kernels.check(["gather"], kernels.Points(path)) == 0
    assert "gather: in the file already" in capsys.readouterr().out
    (record,) = kernels.Points(path).records
    assert record["cases"] > 5 and record["wrong"] == 0
    for _ in range(2):
        assert kernels.compare(["gather"], ["native", "eager"], 60, kernels.Points(path)) == 0
    assert [r["suite"] for r in kernels.Points(path).records] == ["check", "ceiling", "gpu kernels", "ceiling"]


def test_a_wrong_kernel_fails_the_check(kernels, tmp_path, monkeypatch):
    path = tmp_path / "checks.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(kernels.cases, "error", lambda case, device: case.tolerance + 1e-6)
        assert kernels.check(["gather"], kernels.Points(path)) > 5
    # Mended, it is checked again, and what was wrong counts no more.
    assert kernels.check(["gather"], kernels.Points(path)) == 0
    assert len(kernels.Points(path).records) == 2


def test_a_case_that_costs_the_device_is_passed_over_by_the_next_process(kernels, tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    monkeypatch.setattr(kernels, "differs_from_eager", lambda op, case: True)
    monkeypatch.setattr(kernels, "is_lost", lambda: True)
    sizes = kernels.training_sizes(kernels.IMAGES)
    for op in ("gather", "restore"):
        for case in sizes[op]:
            with pytest.raises(SystemExit, match=f"stopped at {op} .*the device does not answer"):
                kernels.compare(["gather", "restore"], ["native"], 60, kernels.Points(path))
            assert kernels.Points(path).records[-1]["case"] == case.name
    assert kernels.compare(["gather", "restore"], ["native"], 60, kernels.Points(path)) == 0
    monkeypatch.setattr(kernels, "machine", lambda: {**kernels.Points(path).records[-1], "commit": "another"})
    with pytest.raises(SystemExit):
        kernels.compare(["gather", "restore"], ["native"], 60, kernels.Points(path))


def test_loaders_go_on_in_the_middle_of_a_round(bench, tmp_path, monkeypatch):
    loaders, calls = bench("bench_loader"), []

    class Broken(RuntimeError):
        pass

    class Contender:
        def __init__(self, make):
            self.make, self.error = make, "absent" if make == "c" else None

        def measure(self, images):
            calls.append(self.make)
            if len(calls) == 4:
                raise Broken
            return float(len(calls)), 10.0

        def close(self):
            pass

    monkeypatch.setattr(loaders, "Contender", Contender)
    monkeypatch.setattr(loaders, "contenders_of", lambda folder, packed: {loaders.BASE: "a", "b": "b", "c": "c"})
    monkeypatch.setattr(loaders, "describe", lambda folder: "files")
    path = tmp_path / "loaders.jsonl"
    with pytest.raises(Broken):
        loaders.compare("photos", tmp_path, 8, 3, loaders.Points(path))
    assert calls == ["a", "b", "a", "b"]
    loaders.compare("photos", tmp_path, 8, 3, loaders.Points(path))
    assert calls == ["a", "b", "a", "b", "b", "a", "b"]
    loaders.compare("photos", tmp_path, 8, 3, loaders.Points(path))
    assert len(calls) == 7, "all is in the file"
    rows = {row["loader"]: row["cpu_ms"] for row in loaders.loader_report.rows(loaders.Points(path).records, "photos")}
    assert rows == {loaders.BASE: [1.0, 3.0, 6.0], "b": [2.0, 5.0, 7.0]}
    page = loaders.loader_report.page(loaders.Points(path).records)
    assert "Not measured: c (absent)." in page and "| b | 5.00 (2.00..7.00) | 0.60 x |" in page


def test_whole_runs_go_on_with_the_run_that_is_missing(bench, tmp_path, monkeypatch):
    e2e, runs = bench("bench_e2e"), []

    def train(flags, steps, out):
        runs.append(flags)
        if len(runs) == 2:
            raise RuntimeError("killed")
        return [{"images_per_s": 90.0 if "--data" in flags else 100.0, "data_wait": 0.01}]

    monkeypatch.setattr(e2e, "train", train)
    path = tmp_path / "e2e.jsonl"
    for i in range(3):
        if i == 0:
            with pytest.raises(RuntimeError, match="killed"):
                e2e.run(tmp_path, "photos", e2e.SMALL, 9, e2e.Points(path))
        else:
            e2e.run(tmp_path, "photos", e2e.SMALL, 9, e2e.Points(path))
    assert ["--data" in flags for flags in runs] == [True, False, False]
    ((real, bare),) = bench("run_report").e2e_pairs(e2e.Points(path).records)
    assert real["images_per_s"] == 90.0 and bare["images_per_s"] == 100.0


def test_pytest_benchmark_gets_the_times(tmp_path):
    """What was measured in turns, round by round; without the plugin the same file runs all the same."""
    case = tmp_path / "bench_case.py"
    case.write_text("def bench_case(told):\n    told([0.25, 0.75, 0.5], {'ours': 0.5, 'eager': 2.0})\n")
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    path, has_plugin = tmp_path / "f.json", importlib.util.find_spec("pytest_benchmark") is not None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(case)]
    # The plugin measures nothing below pytest-xdist, which this test may run in.
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run(
        [*command, *[f"--benchmark-json={path}"] * has_plugin], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    if has_plugin:
        (found,) = json.loads(path.read_text())["benchmarks"]
        assert found["stats"]["median"] == pytest.approx(0.5) and found["stats"]["max"] == pytest.approx(0.75)
        assert found["stats"]["rounds"] == 3 and found["extra_info"]["seconds"] == {"ours": 0.5, "eager": 2.0}
