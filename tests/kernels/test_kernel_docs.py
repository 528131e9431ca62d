"""The pages of docs/kernels are those that make.py writes from docstrings and results."""

import importlib.util
import pathlib

import pytest
from fastmim_kernels import dispatch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "kernels"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("kernel_pages", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("op", dispatch.ops())
def test_page_is_current(op, make):
    path = FOLDER / f"{op}.md"
    assert path.exists() and path.read_text() == make.page(op), "PYTHONPATH=kernels python docs/kernels/make.py"


@pytest.mark.parametrize("op", dispatch.ops())
def test_page_says_why_an_implementation_is_missing(op, make):
    folder = pathlib.Path(dispatch.__file__).parent / op
    is_complete = all((folder / file).exists() for file in ("native.py", "kernel.py"))
    assert is_complete != bool(make.NOTES[op][1]), op
