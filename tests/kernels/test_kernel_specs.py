"""Every op of fastmim_kernels, found by listing the package: it has a spec, and every case is right."""

import ast
import pathlib
import sys

import fastmim_kernels
import pytest
import torch
from fastmim_kernels import cases, dispatch

PACKAGE = pathlib.Path(fastmim_kernels.__file__).parent
CASES = [(op, case) for op in dispatch.ops() for case in cases.load(op)[0]]
DEVICES = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
IDS = [f"{op}-{case.function}-{case.name}" for op, case in CASES]
# Every case on every device with every backend that the op has there.
RUNS = [
    pytest.param(case, device, backend, id=f"{name}-{device.type}-{backend}")
    for (op, case), name in zip(CASES, IDS, strict=True)
    for device in DEVICES
    for backend in dispatch.available(op, device.type)
]


def test_every_op_folder_has_the_files_of_an_op():
    assert len(dispatch.ops()) >= 9
    for op in dispatch.ops():
        assert {"__init__.py", "reference.py", "spec.py"} <= {path.name for path in (PACKAGE / op).iterdir()}, op
        assert all(cases.load(op)), f"{op}: CASES and BENCH both need a case"
        assert op not in fastmim_kernels.__all__, f"{op}: the function would hide the folder of the same name"


def test_every_public_op_has_a_case():
    covered = {case.function for _, case in CASES}
    assert covered == {name for name in fastmim_kernels.__all__ if name[0].islower()} - {"backends", "chosen", "states"}


def test_case_names_are_unique():
    for op in dispatch.ops():
        small, large = cases.load(op)
        names = [(case.function, case.name) for case in small + large]
        assert len(set(names)) == len(names), op


@pytest.mark.parametrize(("case", "device", "backend"), RUNS)
def test_case_agrees_with_reference_in_float64(case, device, backend, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    # Fresh memory holds NaN meanwhile, so an output that is not fully written shows up.
    assert cases.error(case, device) <= case.tolerance


@pytest.mark.parametrize(("op", "case"), CASES, ids=IDS)
def test_case_repeats_bit_for_bit_and_leaves_its_inputs_alone(op, case):
    inputs = case.inputs(torch.device("cpu"))
    before = cases.flatten(cases.map_tensors(inputs, lambda t: t.clone() if isinstance(t, torch.Tensor) else t))
    first = cases.flatten(cases.public(case)(**inputs))
    if not case.result:
        after = cases.flatten(inputs)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True) if isinstance(a, torch.Tensor))
    second = cases.flatten(cases.public(case)(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_error_sees_a_wrong_result(monkeypatch):
    case = next(case for op, case in CASES if op == "gather")
    assert cases.error(case, torch.device("cpu")) == 0

    def wrong(x, ids):
        return x[:, : ids.shape[1]]

    wrong.__module__ = "fastmim_kernels.gather"
    monkeypatch.setattr(fastmim_kernels, "gather_tokens", wrong)
    assert cases.error(case, torch.device("cpu")) > 0.1


def test_package_imports_torch_and_stdlib_only():
    allowed = sys.stdlib_module_names | {"torch", "fastmim_kernels"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            extra = {"triton"} if path.name == "kernel.py" else set()
            assert {name.split(".")[0] for name in names} <= allowed | extra, path
