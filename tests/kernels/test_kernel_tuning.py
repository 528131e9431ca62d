"""Tables of launch constants: defaults, a GPU's own file, a stale one."""

import json
import pathlib

import fastmim_kernels
import pytest
from fastmim_kernels import dispatch, tuning

PACKAGE = pathlib.Path(fastmim_kernels.__file__).parent


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path))
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


def test_defaults_are_powers_of_two_or_counts_of_ops_that_have_kernels():
    assert set(tuning.table("")) <= set(dispatch.ops())
    for op, constants in tuning.table("").items():
        text = (PACKAGE / op / "kernel.py").read_text()
        for name, value in constants.items():
            assert isinstance(value, int) and value > 0
            assert f'"{name}"' in text, f"{op}/kernel.py does not read {name}"


def test_file_of_a_gpu_replaces_what_it_names(tmp_path):
    assert tuning.file_name("NVIDIA H200") == "NVIDIA_H200.json"
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"constants": {"gather": {"ROWS": 8}}}))
    assert tuning.table("NVIDIA H200")["gather"] == {"ROWS": 8}
    assert tuning.table("NVIDIA H200")["restore"] == tuning.table("")["restore"]
    assert tuning.table("NVIDIA A100")["gather"] == tuning.table("")["gather"]


def test_file_with_an_unknown_constant_is_refused(tmp_path):
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"constants": {"gather": {"COLUMNS": 8}}}))
    with pytest.raises(ValueError, match=r"expected constants of default.json, got gather.COLUMNS; tune anew"):
        tuning.table("NVIDIA H200")


def test_shipped_files_are_readable():
    for path in (PACKAGE / "tuned").glob("*.json"):
        if path.name != "default.json":
            assert set(json.loads(path.read_text())) == {"gpu", "torch", "triton", "constants"}


def test_tune_keeps_what_is_faster_and_right(monkeypatch):
    """With a clock that likes 16 rows best, wrong results at 8 images, and a compiler that refuses 1."""
    tune = pytest.importorskip("fastmim.tune")
    constants = tuning.table("")["restore"]
    monkeypatch.setattr(tune.cases, "error", lambda case, device: float(constants["IMAGES"] == 8))

    def clock(tried, device):
        if constants["IMAGES"] == 1:
            raise RuntimeError("out of resources")
        return abs(constants["ROWS"] - 16) + 10 / constants["IMAGES"]

    monkeypatch.setattr(tune, "milliseconds", clock)
    constants["IMAGES"] = 2
    tune.tune_op("restore", constants)
    assert constants == {"ROWS": 16, "IMAGES": 4}


def test_tune_without_a_gpu_says_so(monkeypatch):
    tune = pytest.importorskip("fastmim.tune")
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(tune.ConfigError, match="fastmim tune: expected a CUDA device"):
        tune.tune()
