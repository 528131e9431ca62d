"""All methods on one small data set, for the same number of epochs: what does the encoder learn?

    python bench/ladder.py                                        the demo images; less than half an hour on 2 cores
    python bench/ladder.py --data x.zip --val-data y.zip          archives, or folders, with one folder per class
    python bench/ladder.py --methods mae cmae --seeds 0 1 2       mean and range over the seeds
    python bench/ladder.py --minutes-per-method 4                 as many epochs as each method does in that time

Each method is trained by the command that a user would type, with its `demo` preset but one encoder and one length for
all, and its exported encoder is measured by k-NN and by a linear probe, both on the mean over the patch tokens, each
channel with mean 0 and deviation 1 over the training images: a masked encoder's features have a few channels so large that
a cosine sees nothing else. Rows above them: an encoder with random weights, and plain pixels. Writes Markdown, and JSON with
the same numbers and every run's command beside it. A method that fails is a row that says why; then the exit code is 1.

So small an encoder gains little from a second thread: on a CPU, as many trainings run at a time as there are cores.

It compares what the methods learn here in minutes, from images that are no photographs: not how good they are.
"""

import argparse
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ladder_table import Row, markdown, provenance, write

ROOT = Path(__file__).resolve().parents[1]
# As `pip install -e .` would; harmless after it.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]

from fastmim.boot import prepare_process  # noqa: E402

DEMO_DATA = Path("data/demo")
# Steps that measure the speed for --minutes-per-method.
TRIAL_STEPS = 60
# What a step of so small an encoder costs besides its images, in the time that these FLOPs take: the step itself, and each of
# the tensors of weights, which make it start operations. Fitted to one training of each method.
STEP_FLOPS, TENSOR_FLOPS = 7.6e9, 4.1e7
# Set for this process by its start; a training finds its own.
OURS = ("OMP_NUM_THREADS", "MASTER_PORT")


class LadderError(Exception):
    """Something the user can mend: printed as one line."""


# ---- data


@contextmanager
def class_folders(path: Path) -> Iterator[Path]:
    """The folder that holds the class folders: `path` itself, or what an archive unpacks to."""
    if not path.exists():
        raise LadderError(f"{path}: expected a folder or a .zip archive, got nothing there; check the path.")
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ladder-") as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(scratch)
        except zipfile.BadZipFile as e:
            raise LadderError(f"{path}: expected a folder or a .zip archive, got another file ({e}).") from e
        yield _without_wrapping(Path(scratch))


def _without_wrapping(folder: Path) -> Path:
    """Enters folders that hold nothing but one other folder: many archives are packed that way."""
    entries = [p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))]
    return _without_wrapping(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


@contextmanager
def image_folders(data: Path | None, val_data: Path | None) -> Iterator[tuple[Path, Path]]:
    """Training and validation folder; the demo images, which are drawn if need be, where none is named."""
    if data is None:
        from fastmim_pipelines.demo import write_demo

        write_demo(DEMO_DATA, progress=print)
        data = DEMO_DATA
    with class_folders(data) as train:
        if val_data is None and (train / "train").is_dir() and (train / "val").is_dir():
            yield train / "train", train / "val"
            return
        if val_data is None:
            raise LadderError(f"--val-data: expected labeled images, or train/ and val/ in {data}, got none.")
        with class_folders(val_data) as val:
            yield train, val


# ---- measuring


class Ruler:
    """Measures feature functions on the same images.

    Raises:
        LadderError: images without a class.
    """

    def __init__(self, train: Path, val: Path, args: argparse.Namespace):
        from fastmim_pipelines.index import FolderIndex

        from fastmim.config import TrainConfig
        from fastmim.device import default_precision, pick_device

        self.train = FolderIndex(train)
        self.val = FolderIndex(val, classes=self.train.classes or None)
        for folder, index in ((train, self.train), (val, self.val)):
            if index.labels is None:
                raise LadderError(f"{folder}: expected one folder per class, got images without a class.")
        size = args.image_size[0] if len(args.image_size) == 1 else tuple(args.image_size)
        self.model = TrainConfig(model=args.model, image_size=size, patch_size=args.patch_size).model_spec()
        self.device = pick_device(args.device)
        self.precision, _ = default_precision(self.device)
        self.workers = args.workers

    def __call__(self, row: Row, features: Callable) -> None:
        """Adds k-NN and linear accuracy to a row."""
        from fastmim.evaluate import knn, linear

        sides = linear.labeled_features(features, self.train, self.val, self.model, self.device, workers=self.workers)
        train, train_labels, val, val_labels = sides
        standard = linear.Standardize(train)
        row.knn_top1 = knn.top1(standard(train), train_labels, standard(val), val_labels)
        found = linear.probe(*sides)
        row.linear_top1, row.linear_weight_decay = found.top1, found.weight_decay

    def encoder(self, row: Row, encoder) -> None:
        from fastmim.engine.base import Precise

        encoder.to(self.device).eval()
        precise = Precise(encoder, self.device.type, self.precision)

        def features(images):
            with precise.autocast():
                return encoder.features(images)

        self(row, features)

    def baselines(self, seed: int) -> list[Row]:
        import torch

        from fastmim.evaluate.knn import raw_pixels
        from fastmim.vit import Encoder

        random, pixels = Row("random init", seed), Row("raw pixels")
        torch.manual_seed(seed)
        self.encoder(random, Encoder(self.model))
        self(pixels, raw_pixels)
        return [random, pixels]


# ---- training


def train_command(method: str, seed: int, length: list[str], out: Path, data: str, args) -> list[str]:
    """Without validation images: the trainer would measure k-NN at the start and the end, and here it is measured below."""
    return [
        sys.executable, str(ROOT / "fastmim" / "train.py"), "--method", method, "--preset", "demo", "--data", data,
        "--model", args.model, "--image-size", *map(str, args.image_size), "--patch-size", str(args.patch_size),
        "--stem", "patch", "--seed", str(seed), *length, "--device", args.device,
        *([] if args.workers is None else ["--workers", str(args.workers)]), "--out", str(out), *args.extra,
    ]  # fmt: skip


def fitting(method: str, images: int, extra: list[str]) -> list[str]:
    """A smaller batch, in whole groups of any method, where there are fewer images than the preset's has."""
    from fastmim.methods.base import find

    is_small = images < find(method).PRESETS["demo"].train["batch_size"] and "--batch-size" not in extra
    return ["--batch-size", str(max(16, images // 16 * 16))] if is_small else []


def told(command: list[str], out: Path, args: argparse.Namespace) -> str:
    """The command as one would type it, without this machine's folders; an archive stands for what it unpacks to."""
    data = str(args.data or DEMO_DATA / "train")
    names = {command[0]: "python", command[1]: "fastmim/train.py", str(out): f"runs/{out.name}"}
    names[command[command.index("--data") + 1]] = data
    return shlex.join(names.get(word, word) for word in command)


def run(command: list[str], out: Path) -> list[dict]:
    """Runs one training process to its end and returns its metrics.

    Raises:
        LadderError: with the process's own words, if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing on stderr"]
        errors = [line for line in said if line.startswith("error: ")]
        raise LadderError(f"exit code {done.returncode}: {(errors or said)[-1].removeprefix('error: ')}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train_method(method: str, seed: int, scratch: Path, args: argparse.Namespace, ruler: Ruler) -> Row:
    """Trains one method in a process of its own, and measures its encoder."""
    from fastmim.export import load_encoder

    row, out, data = Row(method, seed), scratch / f"{method}-{seed}", ruler.train.root
    try:
        length = ["--epochs", f"{args.epochs:g}"]
        batch = fitting(method, len(ruler.train), args.extra)
        if args.minutes_per_method:
            trial = scratch / f"{method}-{seed}-trial"
            records = run(train_command(method, seed, [*batch, "--steps", str(TRIAL_STEPS)], trial, data, args), trial)
            speed = max(r["images_per_s"] for r in records if "loss" in r)
            length = ["--epochs", f"{max(1, 60 * args.minutes_per_method * speed / len(ruler.train)):.0f}"]
        command = train_command(method, seed, [*batch, *length], out, data, args)
        row.command = told(command, out, args)
        began = time.perf_counter()
        records = run(command, out)
        row.seconds = time.perf_counter() - began
        steps = [r for r in records if "loss" in r]
        last = steps[-1]
        row.losses = {name.removeprefix("loss/"): last[name] for name in last if name.startswith("loss/")}
        row.epochs = last["epoch"]
        row.images_seen = last["step"] * _batch_size(out)
        row.images_per_s = statistics.median(r["images_per_s"] for r in steps)
        ruler.encoder(row, load_encoder(out / "encoder.safetensors"))
    except Exception as e:
        # One method's defect must not cost the others their rows; it is shown, and decides the exit code.
        row.error = f"{type(e).__name__}: {e}" if not isinstance(e, LadderError) else str(e)
    return row


def _batch_size(out: Path) -> int:
    import yaml

    return yaml.safe_load((out / "config.yaml").read_text())["batch_size"]


# ---- the command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/ladder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="training images: folder or .zip; default: the demo images")
    parser.add_argument("--val-data", type=Path, help="validation images; default: val/ beside train/ in --data")
    parser.add_argument("--methods", nargs="+", help="default: all there are")
    length = parser.add_mutually_exclusive_group()
    # The length of the demo presets.
    length.add_argument("--epochs", type=float, default=50.0, help="passes over the data, for every method")
    length.add_argument("--minutes-per-method", type=float, help="instead: epochs from a short trial of each method")
    parser.add_argument("--model", default="vit_pico")
    parser.add_argument("--image-size", nargs="+", type=int, default=[48])
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, help="trainings at a time; default: one per core on a CPU, else 1")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, help="decoding processes; default: from the cores at hand")
    parser.add_argument("--out", type=Path, help="default: bench/results/ladder-<date>.md")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="the rest: more flags for every training")
    return parser.parse_args(argv)


def ladder(argv: list[str]) -> int:
    from fastmim.methods.base import available

    args = parse(argv)
    unknown = sorted(set(args.methods or []) - set(available()))
    if unknown:
        raise LadderError(f"--methods: expected some of {', '.join(available())}, got {', '.join(unknown)}.")
    out = args.out or ROOT / "bench" / "results" / f"ladder-{time.strftime('%Y-%m-%d')}.md"
    began = time.perf_counter()
    with image_folders(args.data, args.val_data) as folders, tempfile.TemporaryDirectory(prefix="ladder-") as scratch:
        ruler = Ruler(*folders, args)
        runs = [(method, seed) for method in args.methods or available() for seed in args.seeds]
        longest_first = sorted(runs, key=lambda run: -cost(*run, args))
        shares = core_shares(args.jobs or (len(runs) if ruler.device.type == "cpu" else 1))
        rows, about = ruler.baselines(args.seeds[0]), provenance(args, argv, ruler, shares)
        free: queue.SimpleQueue = queue.SimpleQueue()
        for share in shares:
            free.put(share)

        def train(run: tuple[str, int]) -> Row:
            import torch

            # Both are this thread's, and the affinity is that of the processes that it starts, too.
            os.sched_setaffinity(0, free.get_nowait())
            torch.set_num_threads(len(shares[0]))
            print("{}, seed {} ...".format(*run), flush=True)
            try:
                return train_method(*run, Path(scratch), args, ruler)
            finally:
                free.put(os.sched_getaffinity(0))

        with ThreadPoolExecutor(len(shares)) as pool:
            for row in pool.map(train, longest_first):
                rows.append(row)
                rows[2:] = sorted(rows[2:], key=lambda row: runs.index((row.name, row.seed)))
                write(out, about, rows)
    about["seconds"] = time.perf_counter() - began
    write(out, about, rows)
    print(markdown(about, rows))
    print(f"written: {out} and {out.with_suffix('.json')}")
    return 1 if any(row.error for row in rows) else 0


def cost(method: str, seed: int, args: argparse.Namespace) -> float:
    """What an image costs in FLOPs, where a formula says; a training that cannot start has none."""
    import torch

    from fastmim.arguments import parse_train
    from fastmim.config import ConfigError
    from fastmim.flops import training_flops
    from fastmim.methods import base

    try:
        config = parse_train(train_command(method, seed, ["--epochs", "1"], Path("runs"), ".", args)[2:])
        with torch.device("meta"):
            tensors = len(list(base.build(method, config.model_spec(), config.options, 0).parameters()))
    except ConfigError:
        return 0.0
    found = training_flops(method, config.model_spec(), config.options)
    return 0.0 if found is None else found.training + (STEP_FLOPS + TENSOR_FLOPS * tensors) / config.batch_size


def core_shares(jobs: int) -> list[list[int]]:
    """The cores at hand in as many equal shares as there are trainings at a time."""
    cores = sorted(os.sched_getaffinity(0))
    jobs = max(1, min(jobs, len(cores)))
    size = len(cores) // jobs
    return [cores[i * size : (i + 1) * size] for i in range(jobs)]


def main(argv: list[str]) -> int:
    from fastmim_pipelines.spec import DataError

    from fastmim.config import ConfigError

    try:
        return ladder(argv)
    except (LadderError, ConfigError, DataError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Before torch is imported: threads by the cores at hand.
    prepare_process()
    sys.exit(main(sys.argv[1:]))
