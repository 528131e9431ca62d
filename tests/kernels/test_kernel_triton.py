"""Runs the tests of triton_cases.py under Triton's interpreter, in a process of their own.

The interpreter has to be chosen before Triton is imported, and would then serve every other test as well.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def test_kernels_pass_under_the_interpreter():
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", here / "triton_cases.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "FASTMIM_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output; alone: TRITON_INTERPRET=1 FASTMIM_KERNELS=triton pytest " + str(
        here / "triton_cases.py"
    )


def test_the_switch_for_tf32_is_read_whichever_of_its_two_names_was_used():
    """torch refuses to tell the older one once the newer was used: https://github.com/pytorch/pytorch/pull/189955."""
    for line, allows in (
        ("", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'ieee'", False),
    ):
        code = f"import torch\n{line}\nfrom fastmim_kernels.gpu import allows_tf32\nprint(allows_tf32())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == str(allows), (line, done.stderr)
