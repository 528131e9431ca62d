"""The table of compiled kernels: bench/results/aot.json."""

import hashlib
import json
import pathlib
import re

import fastmim_kernels

PACKAGE = pathlib.Path(fastmim_kernels.__file__).parent
PATH = pathlib.Path(__file__).parents[2] / "bench" / "results" / "aot.json"


def sources_hash(op: str) -> str:
    """Of everything that decides how the kernels of an op are compiled, Triton's version apart."""
    texts, names = {"launch": (PACKAGE / "launch.py").read_text()}, [op]
    while names:
        name = names.pop()
        texts[name] = (PACKAGE / name / "kernel.py").read_text()
        names += [other for other in re.findall(r"from \.\.(\w+)\.kernel import", texts[name]) if other not in texts]
    constants = json.loads((PACKAGE / "tuned" / "default.json").read_text())
    texts["tuned"] = json.dumps({name: constants[name] for name in sorted(texts) if name in constants})
    texts["spec"] = (PACKAGE / op / "spec.py").read_text()
    return hashlib.sha256("\0".join(texts[name] for name in sorted(texts)).encode()).hexdigest()[:16]


def write(path: pathlib.Path, version: str, ops: list[str], rows: list[dict[str, object]]) -> None:
    """One line per row, so that a difference is readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({"triton": version, "sources": {op: sources_hash(op) for op in ops}})
    path.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
