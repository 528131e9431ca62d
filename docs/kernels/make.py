"""Writes the page of each op of fastmim_kernels: `PYTHONPATH=kernels python docs/kernels/make.py`.

Text comes from the docstrings, numbers from bench/results; what neither says stands in NOTES below.
"""

import enum
import importlib
import inspect
import json
import pathlib

import torch
from fastmim_kernels import cases, dispatch

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / "bench" / "results"
CASES = (
    "The largest error of every implementation against the reference in float64, in units of max(1, |result|), gradients "
    "included, on these sizes and more:"
)

# Op -> (what is kept in memory, why there is no native or no Triton implementation; "" where there are both).
NOTES = {
    "activation": (
        "x. The reference keeps x + bias, in float32 or wider, where there is a bias.",
        "",
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
        "x and the weight in the dtype of the product. The reference of gelu_linear keeps what GELU gives, too.",
        "No Triton: the vendor's product is what runs on a GPU.",
    ),
    "depthwise": (
        "x, for the gradient of the weight; a float32 map of one image per thread. The reference makes maps of the batch.",
        "No Triton: cuDNN's convolution is what runs on a GPU.",
    ),
    "ema": (
        "Nothing beyond the tensors that are updated; on a CPU one online tensor at a time in the dtype of its target.",
        "No native: torch's lerp runs at the speed of the memory (12 bytes per value).",
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
    "patches": ("Nothing is kept: pixels are constants. Meanwhile, one patch of float32 per thread.", ""),
    "philox": ("Nothing is kept. Meanwhile the reference holds several int64 tensors of the result's size.", ""),
    "pixel_loss": (
        "pred, and its gradient where the loss made it; no target, no normalized image. With V values per patch, "
        "B x M x V x 4 bytes less than plain torch.",
        "",
    ),
    "qkv": (
        "The projections, and one number per row of the scores. The reference keeps the weights, B x H x N x N values.",
        "Native: bfloat16, up to 1024 tokens, on a CPU that multiplies it (AMX or AVX512_BF16). No Triton: torch's attention "
        "is what runs on a GPU.",
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


# Op -> where it does not pay on a CPU.
SLOW = {
    "activation": "On a CPU leave a bias to the linear layer before, which adds it for nothing, as `functional.linear_gelu` "
    "does. With one, torch's own ops add and activate in float32, for one rounding in place of two, which is slower than "
    "`F.gelu(x + bias)`.",
    "ema": "On a CPU it is torch's own lerp, and no faster than a loop of `t.mul_(m).add_(o, alpha=1 - m)` from bfloat16.",
    "infonce": "On a CPU it saves memory more than time: 128 x 4096 takes as long as plain torch.",
    "resize": "On a CPU it is slower than torch's own antialiased `F.interpolate`, box by box: see above.",
}


def page(op: str) -> str:
    """The text of an op's page."""
    module = importlib.import_module(f"fastmim_kernels.{op}")
    memory, absent = NOTES[op]
    found = [b for b, file in dispatch.FILES.items() if (pathlib.Path(module.__file__).parent / f"{file}.py").exists()]
    lines = [f"# {op}", "", inspect.getdoc(module), ""]
    for name in module.__all__:
        public = getattr(module, name)
        if inspect.isfunction(public):
            lines += [f"## {name}", "", "```python", signature(public), "```", "", *body(inspect.getdoc(public)), ""]
        elif issubclass(public, enum.Enum):
            members = ", ".join(f"`{member.name}` {member.value}" for member in public)
            lines += [f"## {name}", "", inspect.getdoc(public), "", f"{members}.", ""]
    lines += ["## Implementations", "", f"{', '.join(found)}. {absent}".strip(), ""]
    schemas = [str(getattr(torch.ops.fastmim, n).default._schema) for n in registered(module)]
    if schemas:
        lines += ["Registered with torch.library:", "", "```", *schemas, "```", ""]
    lines += ["## Memory", "", f"What is kept, or held meanwhile: {memory}", ""]
    small, large = cases.load(op)
    lines += ["## Numerics", "", CASES, "", *(f"- {c.function} {c.name}, {bound(c)}" for c in small), ""]
    lines += ["## Speed", "", *([SLOW[op], ""] if op in SLOW else []), *speed({c.function for c in large})]
    lines += compiled(op)
    lines += ["*Written by docs/kernels/make.py from docstrings and `bench/results`.*"]
    return "\n".join(lines).rstrip() + "\n"


def bound(case: cases.Case) -> str:
    """The largest error allowed, in words."""
    return f"at most {case.tolerance:.3g}" if case.tolerance else "bit for bit"


def signature(function) -> str:
    """As one would write it: an argument per line where all do not fit into one."""
    whole = inspect.signature(function)
    arguments, is_keyword_only = [], False
    for parameter in whole.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            is_keyword_only = True
            arguments.append("*")
        arguments.append(str(parameter))
    result = inspect.formatannotation(whole.return_annotation)
    line = f"{function.__name__}({', '.join(arguments)}) -> {result}"
    if len(line) > 100:
        line = "\n".join([f"{function.__name__}(", *(f"    {argument}," for argument in arguments), f") -> {result}"])
    for module in ("collections.abc.", f"{function.__module__}."):
        line = line.replace(module, "")
    return line.replace("torch.Tensor", "Tensor")


SECTIONS = ("Returns:", "Raises:", "Source:", "Args, Raises:")


def body(text: str) -> list[str]:
    """A docstring as Markdown: its sections as paragraphs, arguments as they stand."""
    lines, is_quoted = [], False
    for line in text.splitlines():
        if line == "Args:":
            lines += ["```", line]
            is_quoted = True
            continue
        if is_quoted and line and not line.startswith(" "):
            while not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            is_quoted = False
        section = next((s for s in SECTIONS if line.startswith(s)), "")
        if section and lines and lines[-1]:
            lines.append("")
        lines.append(f"**{section}**{line.removeprefix(section)}" if section else line if is_quoted else line.strip())
    return [*lines, "```"] if is_quoted else lines


def registered(module) -> list[str]:
    values = [inspect.unwrap(v) for v in vars(module).values() if callable(v)]
    ops = {v._qualified_op_name for v in values if isinstance(v, torch._ops.OpOverloadPacket)}
    return sorted(op.partition("::")[2] for op in ops)


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
        "Medians in ms, forward and backward where there is one (`fastmim bench kernels`). eager, compile: plain torch; the last "
        "column: how much faster than it eagerly is what runs here.",
        "",
    ]
    for setting in sorted({row["setting"] for row in rows}):
        lines += [
            f"{setting}:",
            "",
            f"| case | commit | n | {' | '.join(columns)} | against eager |",
            "|---|---|---|" + "---|" * len(columns) + "---|",
        ]
        for row in rows:
            if row["setting"] != setting:
                continue
            ms, name = row["ms"], f"{row['function']} {row['case']}"
            values = " | ".join(f"{ms[c]:.2f}" if c in ms else "" for c in columns)
            ours = next(ms[b] for b in ("triton", "native", "reference") if b in ms)
            ratio = f"{ms['eager'] / ours:.2g}x" if "eager" in ms else ""
            lines.append(f"| {name} | {row.get('commit', '')} | {row['n']} | {values} | {ratio} |")
        lines.append("")
    return lines


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
