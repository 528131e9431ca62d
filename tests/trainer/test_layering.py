"""Who imports whom, read from the source; and names that would break an interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_run import ROOT, environment

CORE = {
    "vit",
    "masking",
    "targets",
    "views",
    "ema",
    "optim",
    "schedule",
    "dist",
    "config",
    "contrast",
    "heads",
    "heat",
    "homologous",
    "conv",
    "tokenizer",
    "attention",
    "blocks",
    "recompute",
    "savers",
}
# Module -> what it may import of ours. Anything not listed is free (cli puts everything together).
RULES: dict[str, set[str]] = {
    **{f"fastmim/{name}.py": {"fastmim_kernels", *CORE} for name in CORE - {"tokenizer"}},
    "fastmim/tokenizer/*.py": {"fastmim_kernels", "fastmim_pipelines.spec", *CORE},
    "fastmim/methods/*.py": {"fastmim_kernels", "fastmim_pipelines.spec", "methods.base", *CORE},
    "fastmim/engine/*.py": {"fastmim_kernels", "fastmim_pipelines.spec", "engine", *CORE},
    "fastmim/trainer.py": {
        "fastmim_pipelines.spec",
        "engine.base",
        "methods.base",
        "captures",
        "checkpoint",
        "graph",
        "metrics",
        "nonfinite",
        "restarts",
        "resuming",
        "saving",
        "signals",
        "step",
        "watchdog",
        *CORE,
    },
    "fastmim/checkpoint.py": set(),
    "fastmim/saving.py": {"checkpoint", "dist"},
    "fastmim/watchdog.py": {"dist"},
    "fastmim/nonfinite.py": set(),
    "kernels/fastmim_kernels/**/*.py": {"fastmim_kernels"},
    "pipelines/fastmim_pipelines/**/*.py": {"fastmim_pipelines"},
}
# What the two independent packages may import besides the standard library.
THIRD_PARTY = {"kernels/fastmim_kernels/**/*.py": {"torch", "triton"},
               "pipelines/fastmim_pipelines/**/*.py": {"torch", "numpy", "PIL", "nvidia", "ffcv"}}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Absolute names of all imported modules, lazy ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = path.relative_to(ROOT).parts
                found.add(".".join(parts[:-1]) if parts[0] == "fastmim" else parts[1])
            elif node.module == "fastmim":
                found |= {f"fastmim.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def is_allowed(name: str, allowed: set[str]) -> bool:
    ours = name.removeprefix("fastmim.")
    return any(ours == a or ours.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("pattern", sorted(RULES))
def test_imports_respect_the_layers(pattern):
    files = sorted(ROOT.glob(pattern))
    assert files, f"{pattern} matches nothing: the rule is dead"
    for path in files:
        ours = {n for n in imports(path) if n.split(".")[0] in ("fastmim", "fastmim_kernels", "fastmim_pipelines")}
        bad = sorted(n for n in ours if not is_allowed(n, RULES[pattern]) and n != "fastmim.methods")
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


@pytest.mark.parametrize("pattern", sorted(THIRD_PARTY))
def test_packages_need_nothing_else(pattern):
    for path in sorted(ROOT.glob(pattern)):
        roots = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        roots -= {"fastmim_kernels", "fastmim_pipelines"}
        assert roots <= THIRD_PARTY[pattern], path


def test_methods_do_not_import_each_other():
    names = {p.stem for p in (ROOT / "fastmim/methods").glob("*.py")} - {"__init__", "base"}
    for name in names:
        others = {f"fastmim.methods.{n}" for n in names - {name}}
        assert not imports(ROOT / f"fastmim/methods/{name}.py") & others


def test_deepspeed_is_imported_by_the_zero_engine_alone():
    users = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastmim").rglob("*.py")
             if any(n.split(".")[0] == "deepspeed" for n in imports(p))}  # fmt: skip
    assert users == {"fastmim/engine/zero.py"}


def test_nothing_imports_tests_or_bench():
    for folder in ("fastmim", "kernels", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {n.split(".")[0] for n in imports(path)} & {"tests", "bench"}, path


def test_no_module_shadows_the_standard_library():
    # A launcher puts fastmim/ first on sys.path.
    names = {p.stem for p in (ROOT / "fastmim").iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", ["fastmim", "fastmim.boot"])
def test_import_before_boot_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


@pytest.mark.parametrize("package", ["fastmim_kernels", "fastmim_pipelines"])
def test_package_imports_alone(package):
    folder = "kernels" if package == "fastmim_kernels" else "pipelines"
    # torch itself looks for Triton and does without.
    code = f"import sys; sys.modules['triton'] = None; import {package}; sys.exit(bool({{'fastmim', 'deepspeed'}} & set(sys.modules)))"
    env = environment(PYTHONPATH=str(ROOT / folder))
    assert subprocess.run([sys.executable, "-c", code], env=env, cwd="/").returncode == 0


def test_checkpoints_are_never_unpickled():
    for folder in ("fastmim", "kernels", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    text = ast.unparse(node.func)
                    assert text not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), f"{path}: {text}"
