"""Training steps side by side: `python bench/bench_step.py --json bench/results/steps-cpu.jsonl`, or `pytest bench -s`.

Ways to take the same step, on the same weights, images and masks, in turns, so that a slow phase of the machine hits all:

    ours       the method in the `single` engine
    plain      the same on plain torch ops: FASTMIM_KERNELS=reference, unfused AdamW
    official   MAE and CMAE as their official codes compute them (official.py)
    stock      official with torch.compile, torch's fused attention and fused AdamW: the best that needs no kernels
    hf         transformers' ViTMAE, where it is installed; its masks are its own

The losses of several steps must agree before anything is timed. A line of JSON per way and case, added as soon as it is
measured: a file that has a case already is left as it is there, so that a broken run goes on where it stopped. Times on a
CPU are process CPU time per thread. First and last come the machine's ceilings, a matrix product and a copy.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import official
import pytest
import torch
from counters import count_step
from fastmim_pipelines import make_loader

from fastmim.bench import config_of
from fastmim.device import default_precision
from fastmim.engine import base as engines
from fastmim.flops import mfu, peak_flops, training_flops
from fastmim.memory import micro_batches
from fastmim.methods import base as methods

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
WAYS = ("ours", "plain", "official", "stock", "hf")
# Relative to ours, over the steps before timing.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
KEY = ("method", "model", "image_size", "patch_size", "batch_size", "precision")
LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)


# ---- ways to take a step


class Ours:
    """The method in an engine, as the trainer runs it."""

    counts = True
    reads_loss = False

    def __init__(self, case: dict):
        config = config_of(case)
        self.precision, self.batch_size = case["precision"], case["batch_size"]
        self.method = methods.build(case["method"], config.model_spec(), config.options, seed=0).to(DEVICE)
        loader, _ = make_loader("synthetic", self.method.crops, batch_size=self.batch_size, in_chans=3)
        batch = next(iter(loader.epoch(0)))
        self.batch = batch._replace(crops=tuple(c.to(DEVICE) for c in batch.crops), ids=batch.ids.to(DEVICE))
        self.rng = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        self.pairs = self.method.ema_pairs()
        self.parts = micro_batches(replace(config, precision=self.precision), self.method, 1, DEVICE)
        self.start()

    def start(self) -> None:
        self.engine = engines.build("single", self.method, engines.EngineSpec(
            device=DEVICE, precision=self.precision, accumulate=self.parts, micro_batch=self.batch_size // self.parts,
            lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, clip=None, zero_stage=0))  # fmt: skip

    def prepare(self) -> None:
        """What is not part of a step."""

    def forward(self) -> torch.Tensor:
        return self.engine.forward(self.batch, self.rng).loss

    def finish(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()
        self.engine.ema(self.pairs, self.method.momentum(0.0))
        self.rng[1] += 1

    def step(self) -> torch.Tensor:
        """In micro-batches, as the trainer cuts it on this device."""
        whole, losses = self.batch, []
        size = self.batch_size // self.parts
        for start in range(0, self.batch_size, size):
            rows = slice(start, start + size)
            self.batch = whole._replace(crops=tuple(c[rows] for c in whole.crops), ids=whole.ids[rows])
            loss = self.forward()
            losses.append(loss.detach())
            if len(losses) < self.parts:
                self.engine.backward(loss)
        self.finish(loss)
        self.batch = whole
        return torch.stack(losses).mean()


class Plain(Ours):
    """The same on the plain torch ops of the kernel package."""

    def forward(self) -> torch.Tensor:
        # The backward pass of an op is that of the backend that computed it; the average of targets stays a fast one.
        with patch.dict(os.environ, FASTMIM_KERNELS="reference"):
            return super().forward()

    def start(self) -> None:
        super().start()
        self.engine.optimizer = torch.optim.AdamW(self.engine.optimizer.param_groups, lr=LR, betas=BETAS, foreach=False)
        self.engine.optimizer.zero_grad()


class OfficialStyle(Ours):
    is_stock, reads_loss = False, True

    def start(self) -> None:
        if self.is_stock and self.method.ema_pairs():
            self.targets, self.onlines = [p.target for p in self.pairs], [p.online for p in self.pairs]
        self.model = official.Official(self.method, fused_attention=self.is_stock)
        decayed = [p for n, p in self.method.named_parameters() if p.requires_grad and not self.method.no_decay(n, p)]
        spared = [p for n, p in self.method.named_parameters() if p.requires_grad and self.method.no_decay(n, p)]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": spared, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True if self.is_stock else None)
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision != "fp32")

    def prepare(self) -> None:
        self.views = official.views(self.method, self.batch, self.rng)
        self.noise = official.order_of(self.method, self.batch, self.rng)

    def forward(self) -> torch.Tensor:
        with self.autocast:
            return self.model(*self.views, self.noise)

    def finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average(self.method.momentum(0.0))
        self.rng[1] += 1

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        for pair in self.pairs:
            pair.target.data = pair.target.data * momentum + pair.online.data * (1.0 - momentum)

    def step(self) -> torch.Tensor:
        loss = self.forward()
        if self.reads_loss and not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        self.finish(loss)
        return loss.detach()


class Stock(OfficialStyle):
    is_stock, counts, reads_loss = True, False, False

    def start(self) -> None:
        super().start()
        self.model = torch.compile(self.model, dynamic=False)

    @torch.no_grad()
    def average(self, momentum: float) -> None:
        if self.pairs:
            torch._foreach_lerp_(self.targets, self.onlines, 1 - momentum)


class HuggingFace(OfficialStyle):
    """Same sizes, own weights and masks: its loss is not compared."""

    def start(self) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        m, e, o = self.method.model, self.method.encoder, self.method.config
        self.method_pixels, self.pairs = self.method, []
        config = ViTMAEConfig(
            hidden_size=e.width, num_hidden_layers=len(e.blocks), num_attention_heads=e.blocks[0].attn.heads,
            intermediate_size=4 * e.width, image_size=m.image_size[0], patch_size=m.patch_size,
            mask_ratio=o.mask_ratio, norm_pix_loss=True, decoder_hidden_size=o.decoder_width,
            decoder_num_hidden_layers=o.decoder_depth, decoder_num_attention_heads=o.decoder_heads,
            decoder_intermediate_size=4 * o.decoder_width, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = ViTMAEForPreTraining(config).to(DEVICE)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision != "fp32")

    def forward(self) -> torch.Tensor:
        with self.autocast:
            return self.model(self.views[0]).loss


MAKE: dict[str, Callable[[dict], Ours]] = {
    "ours": Ours, "plain": Plain, "official": OfficialStyle, "stock": Stock, "hf": HuggingFace,
}  # fmt: skip


def why_not(way: str, method: str) -> str:
    """'' or the reason why there is no such way to take the method's step here."""
    if way in ("official", "stock") and method not in ("mae", "cmae"):
        return "official.py has MAE and CMAE"
    if way == "stock" and os.environ.get("FASTMIM_BENCH_COMPILE", "1") != "1":
        return "FASTMIM_BENCH_COMPILE=0"
    if way == "hf" and (method != "mae" or importlib.util.find_spec("transformers") is None):
        return "transformers has MAE alone" if method != "mae" else "transformers is not installed"
    return ""


# ---- measuring


def clock() -> float:
    if IS_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def seconds_of(action: Callable[[], object], times: int) -> float:
    """Of the fastest call."""
    found = []
    for _ in range(times):
        began = clock()
        action()
        found.append(clock() - began)
    return min(found)


def ceilings() -> dict:
    """What the machine can do, measured now: products in bf16 (fp32 where there is none), copies."""
    side, size, times = (8192, 2**31, 20) if IS_GPU else (1536, 2**27, 4)
    dtype = torch.bfloat16 if default_precision(DEVICE)[0] == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    seconds_of(lambda: (a @ b, target.copy_(source)), 2)
    a32, b32 = a.float(), b.float()
    return {
        "suite": "ceiling", **machine(),
        "matmul_tflops": 2 * side**3 / seconds_of(lambda: a @ b, times) / 1e12,
        "matmul_fp32_tflops": 2 * side**3 / seconds_of(lambda: a32 @ b32, times) / 1e12,
        "copy_gb_s": 2 * size / seconds_of(lambda: target.copy_(source), times) / 1e9,
    }  # fmt: skip


def machine() -> dict:
    git = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if IS_GPU else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "device_type": DEVICE.type, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "commit": git.stdout.strip() or "unknown"}  # fmt: skip


def measure(case: dict, ways: list[str], rounds: int, checked: int, seconds: float, ceiling: dict) -> list[dict]:
    """One record per way. Raises AssertionError where losses differ: there is no speed for another computation."""
    found, compile_s = {}, {}
    for way in ways:
        torch._dynamo.reset()
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        found[way] = MAKE[way](case)
        began = time.perf_counter()
        losses = []
        for _ in range(checked):
            found[way].prepare()
            losses.append(float(found[way].step()))
            compile_s.setdefault(way, time.perf_counter() - began)
        found[way].losses = losses
        assert all(map(math.isfinite, losses)), f"{way}: no speed for losses {losses}"
    expected = found["ours"].losses
    errors = {
        way: max(abs(a - b) / abs(b) for a, b in zip(w.losses, expected)) for way, w in found.items() if way != "hf"
    }
    for way, error in errors.items():
        assert error <= TOLERANCE[case["precision"]], f"{way}: losses {found[way].losses}, ours {expected}"
    times: dict[str, list[float]] = {way: [] for way in found}
    began = time.perf_counter()
    for _ in range(rounds):
        for way, each in found.items():
            each.prepare()
            start = clock()
            each.step()
            times[way].append(clock() - start)
        if time.perf_counter() - began > seconds and len(times["ours"]) >= 3:
            break
    return [
        _record(case, way, each, times[way], errors.get(way), compile_s[way], ceiling) for way, each in found.items()
    ]


def _record(case, way, each, times, error, compile_s, ceiling) -> dict:
    ms = sorted(1e3 * t for t in times)
    config = config_of(case)
    flops = training_flops(case["method"], config.model_spec(), config.options)
    middle = statistics.median(ms)
    speed = 1e3 * case["batch_size"] / middle
    product = ceiling["matmul_tflops" if case["precision"] == "bf16" else "matmul_fp32_tflops"] * 1e12
    peak = peak_flops(ceiling["device"]) if case["precision"] == "bf16" else None
    counted = count_step(each) if each.counts else {}
    record = {
        "suite": "step", **case, "provider": way, "n": len(ms), "ms": middle, "ms_20": ms[len(ms) // 5],
        "ms_80": ms[-1 - len(ms) // 5], "images_per_s": speed, "mfu_measured": mfu(speed, flops, product),
        "mfu_datasheet": mfu(speed, flops, peak), "first_step_s": compile_s, "loss_error": error, **counted, **machine(),
    }  # fmt: skip
    if IS_GPU:
        record["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return record


# ---- files


def done(path: Path | None) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def add(path: Path | None, records: list[dict]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))


def run(cases: list[dict], ways: list[str], path: Path | None, rounds: int, checked: int, seconds: float) -> list[dict]:
    """Measures what the file lacks; returns all records of it."""
    before = done(path)
    known = {(*(r.get(k) for k in KEY), r.get("provider")) for r in before}
    first = ceilings()
    add(path, [first])
    records = [*before, first]
    for case in cases:
        wanted = [w for w in ways if not why_not(w, case["method"])]
        if all((*(case[k] for k in KEY), w) in known for w in wanted):
            print(f"  {describe(case)}: in the file already")
            continue
        new = measure(case, wanted, rounds, checked, seconds, first)
        add(path, new)
        records += new
        print(f"  {describe(case)}, n={new[0]['n']}")
        ours = new[0]["ms"]
        for r in new:
            print(f"    {r['provider']:9}{r['images_per_s']:9.1f} img/s {r['ms']:9.1f} ms  ours is {r['ms'] / ours:5.2f} x  "
                  f"{r.get('ops', '-')!s:>6} ops {r.get('host_syncs', '-')!s:>3} syncs {r.get('saved_mib', float('nan')):8.0f} MiB saved", flush=True)  # fmt: skip
    last = ceilings()
    add(path, [last])
    for name in ("matmul_tflops", "copy_gb_s"):
        print(f"  {name}: {first[name]:.3g} first, {last[name]:.3g} last")
    return [*records, last]


def describe(case: dict) -> str:
    return "{method} {model}/{patch_size} at {image_size}, batch {batch_size}, {precision}".format(**case)


def make_case(method: str, model: str, image_size: int, patch_size: int, batch_size: int, precision: str) -> dict:
    return dict(zip(KEY, (method, model, image_size, patch_size, batch_size, precision)))


# ---- the two doors

QUICK = (
    [("mae", "vit_tiny", 8), ("cmae", "vit_tiny", 8)]
    if not IS_GPU
    else [("mae", "vit_base", 256), ("cmae", "vit_base", 128)]
)


@pytest.mark.parametrize(("method", "model", "batch"), QUICK, ids=lambda value: str(value))
def bench_step(method, model, batch, tmp_path):
    precision = default_precision(DEVICE)[0]
    path = Path(os.environ["FASTMIM_BENCH_STEPS"]) if "FASTMIM_BENCH_STEPS" in os.environ else tmp_path / "steps.jsonl"
    print()
    run([make_case(method, model, 224, 16, batch, precision)], list(WAYS), path, rounds=5, checked=3, seconds=40)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps side by side.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the lines go; cases in it are not run again")
    parser.add_argument("--methods", nargs="+", default=methods.available())
    parser.add_argument("--models", nargs="+", default=["vit_base"] if IS_GPU else ["vit_tiny"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256] if IS_GPU else [8])
    parser.add_argument("--precisions", nargs="+", choices=list(TOLERANCE), default=[default_precision(DEVICE)[0]])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--providers", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=100 if IS_GPU else 10)
    parser.add_argument("--checked", type=int, default=20, help="steps whose losses are compared first (default 20)")
    parser.add_argument("--seconds", type=float, default=60, help="of timing per case, at most (default 60)")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures of the file, beside it")
    args = parser.parse_args()
    if not args.report:
        cases = [make_case(m, model, args.image_size, args.patch_size, b, p) for m in args.methods for model in args.models
                 for b in args.batch_sizes for p in args.precisions]  # fmt: skip
        ways = ["ours", *(w for w in args.providers if w != "ours")]
        run(cases, ways, args.json, args.rounds, args.checked, args.seconds)
    if args.json is not None:
        from report import write_report

        write_report(args.json)


if __name__ == "__main__":
    main()
