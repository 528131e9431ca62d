"""Compiles every Triton kernel for GPUs that are absent, in the configurations that the ops launch, and prints a table.

    python tests/kernels/aot_compile.py [--archs sm_80,sm_90] [--ops gather,...] [--first] [--json FILE]
    python tests/kernels/aot_compile.py --archs sm_80,sm_90,sm_100 --json bench/results/aot.json    (what is committed)

Each op is called on the tensors of its BENCH cases and of its small cases in bfloat16, on torch's meta device, forward
and backward. Where it would launch
a kernel, the kernel is compiled instead; ptxas and the disassembler come with Triton. A row of the table is one kernel
with one set of argument types and constants.
"""

import argparse
import contextlib
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# The interpreter would replace the kernels by Python functions.
os.environ["TRITON_INTERPRET"] = "0"
import aot_table
import torch
import triton
from fastmim_kernels import cases, dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What is counted in the machine code.
PATTERNS = {
    "load_128": r"\bLDG(STS)?\.\S*\.128",
    "load_64": r"\bLDG(STS)?\.\S*\.64",
    "load": r"\bLDG(STS)?\.",
    "store_128": r"\bSTG\.\S*\.128",
    "store": r"\bSTG\.",
    "tensor_core": r"\b(HGMMA|HMMA|UTCHMMA|UTC\S*MMA)",
    "atomic": r"\b(ATOMG?|RED)\b",
    "spill": r"\b(STL|LDL)\b",
}


class AbsentGPU:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, arch: str):
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class OnAbsentGPU(TorchDispatchMode):
    """Computes the registered ops of a folder on meta tensors by their Triton launchers."""

    def __init__(self, op: str):
        super().__init__()
        self.kernels = importlib.import_module(f"{dispatch.PACKAGE}.{op}.kernel")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "fastmim":
            return function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2]
        return getattr(self.kernels, name)(*args)


@contextlib.contextmanager
def recording(kernels: list, known: set[str]):
    """Compile instead of launching, and note what was compiled; kernels whose names are known are left out."""
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if self.fn.__name__ in known:
            return
        kernels.append((self.fn.__name__, original(self, *args, grid=(1,), warmup=True, **kwargs)))

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = original


def machine_code(cubin: bytes) -> dict[str, object]:
    """Registers, stack, instructions by kind."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(*command: str) -> str:
            path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                [TOOLS / command[0], *command[1:], file.name], capture_output=True, text=True, env={"PATH": path}
            )
            return done.stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage")))
        code = tool("nvdisasm", "-c")
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]
    found = {name: sum(bool(re.search(pattern, line)) for line in lines) for name, pattern in PATTERNS.items()}
    return {
        "registers": int(usage.get("REG", 0)),
        "stack": int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0)),
        "instructions": len(lines),
        **found,
    }


def compile_op(op: str, arch: str, only: str = "", is_first: bool = False) -> list[dict[str, object]]:
    """One row per kernel and configuration of an op, or per kernel, its first configuration."""
    driver.set_active(AbsentGPU(arch))
    rows, seen = [], set()
    known: set[str] = set()
    small, large = cases.load(op)
    for case in (*large, *(case for case in small if "bfloat16" in case.name)):
        if only not in case.name:
            continue
        kernels: list = []
        error = ""
        try:
            # Triton prints the whole PTX where ptxas fails.
            with recording(kernels, known), OnAbsentGPU(op), contextlib.redirect_stdout(io.StringIO()):
                cases.call(cases.public(case), case, case.inputs(torch.device("meta")))
        except Exception as e:
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            error = f"{type(e).__name__}: {' | '.join(lines[-3:])[:400]}"
            rows.append({"op": op, "case": case.name, "kernel": "", "arch": arch, "error": error})
        if is_first:
            known |= {name for name, _ in kernels}
        for name, kernel in kernels:
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            row = {"op": op, "case": case.name, "kernel": name, "arch": arch, "warps": kernel.metadata.num_warps}
            rows.append({**row, "shared": kernel.metadata.shared, **machine_code(kernel.asm["cubin"])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="sm_80,sm_90")
    parser.add_argument("--ops", default="", help="default: every op that has a kernel.py")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--json", default="")
    options = parser.parse_args()

    # torch.autocast does not know the meta device.
    torch.autocast = lambda *args, **kwargs: contextlib.nullcontext()
    torch.is_autocast_enabled = lambda device_type: False
    # Meta tensors count as those of a GPU.
    dispatch.backend_of = dispatch.compiled_backend = lambda op, device_type: "triton"
    package = pathlib.Path(dispatch.__file__).parent
    ops = (
        options.ops.split(",")
        if options.ops
        else [op for op in dispatch.ops() if (package / op / "kernel.py").exists()]
    )
    rows = [
        row
        for arch in options.archs.split(",")
        for op in ops
        for row in compile_op(op, arch, options.only, options.first)
    ]
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr)
    if options.json:
        aot_table.write(pathlib.Path(options.json), triton.__version__, ops, rows)


if __name__ == "__main__":
    main()
