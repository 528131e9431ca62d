"""The kernels for matrix tiles (AMX) on a CPU without them: compiled against tiles in plain C++, every small case of theirs."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from fastmim_kernels import dispatch, native_library

OPS = ("dense", "qkv", "topk")
SOURCES = ("activation", "attention", "linear", "linear_product", "threads", "topk")
FOLDER = pathlib.Path(__file__).resolve().parents[2] / "kernels" / "csrc"
HEADER = pathlib.Path(__file__).with_name("emulated_tiles.h")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprfchw", "-mavx512bf16")
COMPILER = shutil.which("c++")
HAS_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="this CPU has tiles, with which all tests run")
@pytest.mark.skipif(not HAS_VECTORS, reason="this CPU lacks AVX512_BF16, by which the kernels round")
@pytest.mark.skipif(not COMPILER or not FOLDER.is_dir(), reason="no C++ compiler, or no sources")
def test_kernels_for_tiles_are_right(tmp_path):
    library = tmp_path / "_native_amx.so"
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O2", "-fopenmp-simd", "-shared", "-fPIC", *FLAGS, "-D__AMX_TILE__", "-D__AMX_BF16__",
            "-include", HEADER, f'-DFASTMIM_SOURCES="{native_library.sources_digest(FOLDER)}"',
            *(FOLDER / f"{name}.cpp" for name in SOURCES), "-o", library,
        ],
        check=True,
    )  # fmt: skip
    script = (
        "import pathlib\n"
        "from fastmim_kernels import cases, dispatch, native_library\n"
        f"native_library.candidates = lambda: [pathlib.Path({str(library)!r})]\n"
        "import torch\n"
        f"for op in {OPS}:\n"
        "    assert not dispatch.load(op, 'native'), dispatch.load(op, 'native')\n"
        "    for case in cases.load(op)[0]:\n"
        "        assert cases.error(case, torch.device('cpu')) <= case.tolerance, (op, case.name)\n"
    )
    env = os.environ | {dispatch.VARIABLE: "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
