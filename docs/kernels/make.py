"""Writes the page of each op of fastmim_kernels: `PYTHONPATH=kernels python docs/kernels/make.py`.

Text comes from the docstrings, numbers from bench/results; what neither says stands in NOTES below.
"""

import importlib
import inspect
import json
import pathlib

import torch
from fastmim_kernels import cases, dispatch

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / "bench" / "results"
CASES = "The error of every implementation is held against the reference in float64, on these sizes and more:"

# Op -> (what is kept in memory, why there is no native or no Triton implementation; "" where there are both).
NOTES = {
    "activation": (
        "x for the backward pass; neither x + bias nor its gelu is kept in another dtype.",
        "No native: torch's GELU is vectorized, and a linear layer on a CPU adds its bias for nothing.",
    ),
    "adamw": (
        "Nothing beyond the tensors that are updated: no scaled gradients, no denominators.",
        "",
    ),
    "block_masks": (
        "The masks.",
        "No native: 64 masks of 14 x 14 take the reference 5 ms, beside seconds for the step that they are for.",
    ),
    "dense": (
        "x and the weight in the dtype of the product.",
        "No Triton: the vendor's product is what runs on a GPU.",
    ),
    "depthwise": ("x, for the gradient of the weight.", "No Triton: cuDNN's convolution is what runs on a GPU."),
    "ema": (
        "Nothing beyond the tensors that are updated.",
        "No native: torch's multi-tensor lerp runs at the speed of the memory (12 bytes per value).",
    ),
    "gather": ("ids.", ""),
    "infonce": (
        "The two gradients in float32, made with the loss: (B + N) x D values. A tile or a block of rows of logits exists at "
        "a time, never B x N.",
        "",
    ),
    "layer_norm": ("The sum h, mean and 1 / standard deviation of each row; x only with a layer scale.", ""),
    "masks": ("The masks.", ""),
    "mixing": (
        "src; no image, patch or token beside inputs and result.",
        "No native: MixedAE's mixtures take the reference 1 to 2 % of a step on a CPU.",
    ),
    "patch_contrast": (
        "Features, and three numbers per patch. On a GPU no L x L matrix exists; the reference keeps it.",
        "No native: the products are torch's, and L x L is small (196 x 196 per mixture).",
    ),
    "patches": ("Nothing: pixels are constants.", ""),
    "philox": ("Nothing.", ""),
    "pixel_loss": (
        "pred, and its gradient where the loss made it; no target, no normalized image. With V values per patch, "
        "B x M x V x 4 bytes less than plain torch.",
        "",
    ),
    "qkv": (
        "The projections, and one number per row of the scores.",
        "No Triton: torch's attention is what runs on a GPU.",
    ),
    "resize": (
        "One copy of the batch at the new width, in the dtype of the images.",
        "No native: on a CPU, images reach a batch already cropped and resized by the loader that decoded them. The "
        "reference is for checking, not for speed: it multiplies by whole matrices of weights and takes 7.3 ms per uint8 "
        "image of 320 x 320 to 224 x 224, bicubic, where torch's own antialiased interpolate takes 0.34 ms on boxes cut out "
        "one by one (one thread of an AVX-512 Xeon, torch 2.13, medians of 9 over 16 images).",
    ),
    "restore": ("ids_restore; partial sums of the mask token's gradient, 1 / 32 of a bfloat16 gradient.", ""),
    "token_loss": (
        "Gradients of x, weight and bias, made with the loss; chunk x V logits at a time.",
        "No native: three products by torch take nearly all of the time.",
    ),
    "topk": ("q, k, v, the result and two numbers per query; no N x N matrix.", ""),
    "views": ("On a GPU two float32 copies of the views, only where some are blurred.", ""),
}


def page(op: str) -> str:
    """The text of an op's page."""
    module = importlib.import_module(f"fastmim_kernels.{op}")
    memory, absent = NOTES[op]
    found = [b for b, file in dispatch.FILES.items() if (pathlib.Path(module.__file__).parent / f"{file}.py").exists()]
    lines = [f"# {op}", "", f"Written by docs/kernels/make.py. {inspect.getdoc(module)}", ""]
    for name in module.__all__:
        function = getattr(module, name)
        if inspect.isfunction(function):
            lines += [
                f"## {name}",
                "",
                "```python",
                signature(function),
                "```",
                "",
                *body(inspect.getdoc(function)),
                "",
            ]
    lines += ["## Implementations", "", f"{', '.join(found)}. {absent}".strip(), ""]
    schemas = [str(getattr(torch.ops.fastmim, n).default._schema) for n in registered(module)]
    if schemas:
        lines += ["Registered with torch.library:", "", "```", *schemas, "```", ""]
    lines += ["## Memory", "", f"What is kept, or held meanwhile: {memory}", ""]
    small, large = cases.load(op)
    lines += ["## Numerics", "", CASES, "", *(f"- {c.function} {c.name}, {bound(c)}" for c in small), ""]
    lines += ["## Speed", "", *speed({c.function for c in large})]
    lines += compiled(op)
    return "\n".join(lines).rstrip() + "\n"


def bound(case: cases.Case) -> str:
    """The largest error allowed, in words."""
    return f"at most {case.tolerance:.3g}" if case.tolerance else "bit for bit"


def signature(function) -> str:
    return f"{function.__name__}{inspect.signature(function)}".replace("torch.", "")


def body(text: str) -> list[str]:
    """A docstring as Markdown: its sections as paragraphs, arguments as they stand."""
    lines, is_quoted = [], False
    for line in text.splitlines():
        is_section = line in ("Args:",)
        if is_section:
            lines += ["```", line]
            is_quoted = True
        elif is_quoted and line and not line.startswith(" "):
            lines += ["```", "", line]
            is_quoted = False
        else:
            lines.append(line)
    return [*lines, "```"] if is_quoted else lines


def registered(module) -> list[str]:
    ops = [v for v in vars(module).values() if isinstance(v, torch._ops.OpOverloadPacket)]
    return sorted({op._qualified_op_name.partition("::")[2] for op in ops})


def speed(functions: set[str]) -> list[str]:
    """Rows of bench/results/*.jsonl of these functions."""
    rows = [
        json.loads(line) for path in sorted(RESULTS.glob("kernels-*.jsonl")) for line in path.read_text().splitlines()
    ]
    rows = [row for row in rows if row.get("function") in functions]
    if not rows:
        return ["Not measured yet.", ""]
    columns = [c for c in ("eager", "compile", "reference", "native", "triton") if any(c in row["ms"] for row in rows)]
    lines = [
        "Medians in ms, forward and backward where there is one; the setting is that of `bench/results/`.",
        "",
        f"| case | commit | n | {' | '.join(columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        values = " | ".join(f"{row['ms'][c]:.2f}" if c in row["ms"] else "" for c in columns)
        lines.append(f"| {row['function']} {row['case']} | {row.get('commit', '')} | {row['n']} | {values} |")
    return [*lines, ""]


def compiled(op: str) -> list[str]:
    """The kernels as compiled for sm_90, from bench/results/aot.json."""
    rows = [row for row in json.loads((RESULTS / "aot.json").read_text())["rows"] if row["op"] == op]
    rows = [row for row in rows if row["arch"] == "sm_90" and row["case"] in {c.name for c in cases.load(op)[1]}]
    if not rows:
        return []
    lines = [
        "Compiled for sm_90 (`bench/results/aot.json` has sm_80 and sm_100, too); loads and stores of 16 bytes / all:",
        "",
    ]
    lines += ["| kernel | case | registers | shared bytes | loads | stores |", "|---|---|---|---|---|---|"]
    for r in rows:
        wide = f"{r['load_128']} / {r['load']} | {r['store_128']} / {r['store']}"
        lines.append(f"| {r['kernel']} | {r['case']} | {r['registers']} | {r['shared']} | {wide} |")
    return [*lines, ""]


def main() -> None:
    for op in dispatch.ops():
        (HERE / f"{op}.md").write_text(page(op))


if __name__ == "__main__":
    main()
