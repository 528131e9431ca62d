"""Triton kernels compiled for GPUs that are absent: no spills, wide accesses, tensor cores, and no growth.

bench/results/aot.json is what aot_compile.py found for every configuration and GPU. Each run compiles the first
configuration of every kernel for one GPU and compares; FASTMIM_AOT=all compiles everything anew.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import aot_table
import pytest
from fastmim_kernels import cases

triton = pytest.importorskip("triton", reason="triton is not installed")
HERE = pathlib.Path(__file__).parent
TABLE = json.loads(aot_table.PATH.read_text())
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MISSING = [tool for tool in ("ptxas", "cuobjdump", "nvdisasm") if not (TOOLS / tool).exists()]
OPS = sorted(path.parent.name for path in aot_table.PACKAGE.glob("*/kernel.py"))
ARCHS = ("sm_80", "sm_90", "sm_100")
COMMAND = "python tests/kernels/aot_compile.py --archs sm_80,sm_90,sm_100 --json bench/results/aot.json"
IS_ALL = os.environ.get("FASTMIM_AOT") == "all"
# Bytes of stack that are allowed: on sm_100 ptxas gives away a few registers for more warps.
STACK = {"sm_80": 0, "sm_90": 0, "sm_100": 32}
SHARED = {"sm_80": 164 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
# Ops that move rows, which they have to do 16 bytes at a time.
WIDE = {"gather", "restore", "mixing", "layer_norm", "activation", "ema", "adamw"}
# The narrowest row that allows it: 16 bytes of bfloat16 for each of a warp's 32 threads.
NARROWEST = 256
# Kernels of theirs that do something else.
SINGLE_VALUES = {"partition_kernel", "mix_kernel"}
TENSOR_CORES = {"infonce", "patch_contrast", "topk"}


@functools.cache
def compiled() -> list[dict]:
    if MISSING:
        pytest.skip(f"triton {triton.__version__} comes without {', '.join(MISSING)}")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "aot.json"
        what = ["--archs", ",".join(ARCHS)] if IS_ALL else ["--archs", "sm_90", "--first"]
        done = subprocess.run(
            [sys.executable, HERE / "aot_compile.py", *what, "--json", file],
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(file.read_text())["rows"]


def rows_of(op: str) -> list[dict]:
    """What was compiled now, and what the table has besides."""
    fresh = [row for row in compiled() if row["op"] == op]
    return fresh if IS_ALL else fresh + [row for row in TABLE["rows"] if row["op"] == op]


def name(row: dict) -> str:
    return f"{row['op']}/{row['kernel']} ({row['case']}) on {row['arch']}"


def key(row: dict) -> tuple:
    return row["op"], row["case"], row["kernel"], row["arch"]


@pytest.mark.parametrize("op", OPS)
def test_table_is_that_of_the_sources(op):
    assert TABLE["sources"].get(op) == aot_table.sources_hash(op), f"bench/results/aot.json is out of date: {COMMAND}"


def test_every_kernel_was_compiled():
    """Counted in the sources: what is launched, ``name_kernel[grid]``."""
    for op in OPS:
        launched = set(re.findall(r"(\w+_kernel)\[", (aot_table.PACKAGE / op / "kernel.py").read_text()))
        assert launched and launched <= {row["kernel"] for row in compiled() if row["op"] == op}, op


def defect(row: dict) -> str:
    """What is wrong with a kernel whatever it does; "" if nothing is."""
    if row.get("error"):
        return f"{row['op']} ({row['case']}) on {row['arch']}: {row['error']}"
    if row["stack"] > STACK[row["arch"]]:
        return f"{name(row)} spills {row['stack']} bytes"
    if row["shared"] > SHARED[row["arch"]]:
        return f"{name(row)} needs {row['shared']} bytes of shared memory"
    return f"{name(row)} has atomics: results would not repeat" if row["atomic"] else ""


def allows_wide_accesses(row: dict) -> bool:
    """Whether the rows that a kernel moves are wide enough: those of real sizes, and of any size divisible by 8."""
    if row["kernel"] in SINGLE_VALUES:
        return False
    width = re.search(r"_D(\d+)|x(\d+)_", row["case"])
    if width is None or row["case"] in {case.name for case in cases.load(row["op"])[1]}:
        return True
    values = int(width[1] or width[2])
    return values % 8 == 0 and values >= NARROWEST


def is_narrow(row: dict) -> bool:
    return allows_wide_accesses(row) and not (row["load_128"] and row["store_128"])


def growth(row: dict, before: list[dict]) -> str:
    """What grew by more than a tenth against the rows of the table; "" if nothing did."""
    for what, slack in (("registers", 8), ("instructions", 32)):
        if row[what] > 1.1 * max(r[what] for r in before) + slack:
            return f"{name(row)}: {what} grew to {row[what]}; if that is wanted: {COMMAND}"
    return ""


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills_or_atomics(op):
    rows = rows_of(op)
    assert {row["arch"] for row in rows} >= set(ARCHS)
    assert not list(filter(None, map(defect, rows)))


@pytest.mark.parametrize("op", sorted(WIDE))
def test_kernels_that_move_rows_access_16_bytes_at_a_time(op):
    assert not [name(row) for row in rows_of(op) if is_narrow(row)]


@pytest.mark.parametrize("op", sorted(TENSOR_CORES))
def test_matrix_products_run_on_tensor_cores(op):
    for row in rows_of(op):
        if row["kernel"] != "norm_kernel":
            assert row["tensor_core"], f"{name(row)} does not use tensor cores"


@pytest.mark.parametrize("op", OPS)
def test_kernels_have_not_grown(op):
    if TABLE["triton"] != triton.__version__:
        pytest.skip(f"the table was made with triton {TABLE['triton']}, this is {triton.__version__}")
    before = {}
    for row in TABLE["rows"]:
        before.setdefault(key(row), []).append(row)
    grown = [growth(row, before[key(row)]) for row in compiled() if row["op"] == op and key(row) in before]
    assert not list(filter(None, grown))


def test_checks_find_what_they_look_for():
    """On rows of the table that were made worse."""
    row = next(row for row in TABLE["rows"] if row["op"] == "gather" and row["arch"] == "sm_90")
    assert not defect(row) and not is_narrow(row) and not growth(row, [row])
    assert "spills 16 bytes" in defect({**row, "stack": 16})
    assert "shared memory" in defect({**row, "shared": 300_000})
    assert "atomics" in defect({**row, "atomic": 1})
    assert "ptxas failed" in defect({**row, "error": "ptxas failed"})
    assert is_narrow({**row, "store_128": 0}) and is_narrow({**row, "load_128": 0})
    assert is_narrow({**row, "case": "B2_L49_K12_P1_D512_bfloat16", "load_128": 0})
    for what, slack in (("registers", 8), ("instructions", 32)):
        assert what in growth({**row, what: int(1.1 * row[what]) + slack + 1}, [row])
