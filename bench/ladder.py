"""All methods on one small data set, for the same number of epochs: what does the encoder learn?

    python bench/ladder.py                                        the demo images; less than half an hour on 2 cores
    python bench/ladder.py --data x.zip --val-data y.zip          archives, or folders, with one folder per class
    python bench/ladder.py --methods mae cmae --seeds 0 1 2       mean and range over the seeds
    python bench/ladder.py --minutes-per-method 4                 as many epochs as each method does in that time

Each method is trained by the command that a user would type, with its `demo` preset but one encoder and one length for
all, and its exported encoder is measured by k-NN and by a linear probe, both on the mean over the patch tokens, each
channel with mean 0 and deviation 1 over the training images: a masked encoder's features have a few channels so large that
a cosine sees nothing else. Rows above them: an encoder with random weights, and plain pixels. Writes Markdown, and JSON with the same numbers and every run's command beside it. A method that fails
is a row that says why; then the exit code is 1.

It compares what the methods learn here in minutes, from images that are no photographs: not how good they are.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As `pip install -e .` would; harmless after it.
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "pipelines")]

from fastmim.boot import prepare_process  # noqa: E402

DEMO_DATA = Path("data/demo")
# Steps that measure the speed for --minutes-per-method.
TRIAL_STEPS = 60
PACKAGES = ("torch", "numpy", "pillow", "safetensors")


class LadderError(Exception):
    """Something the user can mend: printed as one line."""


@dataclass
class Row:
    """One run, or one of the two baselines."""

    name: str
    seed: int | None = None
    command: str = ""
    error: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    """Terms of the loss over the last log interval."""
    knn_top1: float | None = None
    linear_top1: float | None = None
    linear_weight_decay: float | None = None
    epochs: float | None = None
    images_seen: int | None = None
    images_per_s: float | None = None
    seconds: float | None = None
    """Of the training process, from its start to its end."""


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


def run(command: list[str], out: Path) -> list[dict]:
    """Runs one training process to its end and returns its metrics.

    Raises:
        LadderError: with the process's own words, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True)
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
        if args.minutes_per_method:
            trial = scratch / f"{method}-{seed}-trial"
            records = run(train_command(method, seed, ["--steps", str(TRIAL_STEPS)], trial, data, args), trial)
            speed = max(r["images_per_s"] for r in records if "loss" in r)
            length = ["--epochs", f"{max(1, 60 * args.minutes_per_method * speed / len(ruler.train)):.0f}"]
        command = train_command(method, seed, length, out, data, args)
        row.command = shlex.join(command)
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


# ---- the table


def provenance(args: argparse.Namespace, argv: list[str], ruler: Ruler) -> dict:
    """What one needs to repeat the table."""
    import torch

    from fastmim import __version__

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changes = git("status", "--porcelain", "--untracked-files=no")
    is_cpu = ruler.device.type == "cpu"
    device = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "command": shlex.join(["python", "bench/ladder.py", *argv]),
        "commit": git("rev-parse", "--short", "HEAD") + (" with local changes" if changes not in ("", "unknown") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": device if is_cpu else torch.cuda.get_device_name(ruler.device),
        "machine": f"{platform.system()} {platform.machine()}",
        "precision": ruler.precision,
        "versions": {
            "fastmim": __version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "encoder": f"{args.model}/{args.patch_size} at {' x '.join(map(str, ruler.model.image_size))}",
        "train_images": len(ruler.train),
        "val_images": len(ruler.val),
        "classes": len(ruler.train.classes),
        "seeds": args.seeds,
    }  # fmt: skip


def markdown(about: dict, rows: list[Row]) -> str:
    """The table, rows of one method and several seeds joined."""
    n = len(about["seeds"])
    spread = f", n = {n} seeds: mean (lowest to highest)" if n > 1 else ", n = 1"
    error = 100 * (0.25 / about["val_images"]) ** 0.5
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Ladder of methods, {about['date']}",
        "",
        f"`{about['command']}`",
        "",
        f"Commit {about['commit']}; {about['device']}, {about['machine']}, {about['precision']}; {versions}.",
        f"Encoder {about['encoder']}; {about['train_images']} training and {about['val_images']} validation images of "
        f"{about['classes']} classes (chance {100 / about['classes']:.1f} %; standard error of an accuracy at most "
        f"{error:.1f} points){spread}.",
        "",
        "| method | loss at the end | k-NN % | linear % | epochs | images seen | images/s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.name for row in rows):
        group = [row for row in rows if row.name == name]
        failed = [row for row in group if row.error]
        good = [row for row in group if not row.error]
        if good:
            losses = ", ".join(f"{part} {_mean([r.losses[part] for r in good], '.4f')}" for part in good[0].losses)
            cells = [
                losses,
                _mean([r.knn_top1 for r in good], ".1f", 100),
                _mean([r.linear_top1 for r in good], ".1f", 100),
                _mean([r.epochs for r in good], "g"),
                _mean([r.images_seen for r in good], ".0f"),
                _mean([r.images_per_s for r in good], ".0f"),
                _mean([r.seconds for r in good], ".1f", 1 / 60),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for row in failed:
            lines.append(f"| {name} | **failed** (seed {row.seed}): {_one_cell(row.error)} |  |  |  |  |  |  |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float | None], style: str, scale: float = 1.0) -> str:
    """Mean, and the range where there is more than one value; nothing for a row without such a value."""
    if not values or None in values:
        return ""
    scaled = [scale * v for v in values]
    text = format(statistics.fmean(scaled), style)
    if max(scaled) > min(scaled):
        text += f" ({min(scaled):{style}} to {max(scaled):{style}})"
    return text


def _one_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


# ---- the command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/ladder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="training images: folder or .zip; default: the demo images")
    parser.add_argument("--val-data", type=Path, help="validation images; default: val/ beside train/ in --data")
    parser.add_argument("--methods", nargs="+", help="default: all there are")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=60.0, help="passes over the data, for every method")
    length.add_argument("--minutes-per-method", type=float, help="instead: epochs from a short trial of each method")
    parser.add_argument("--model", default="vit_pico")
    parser.add_argument("--image-size", nargs="+", type=int, default=[48])
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
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
    with image_folders(args.data, args.val_data) as folders, tempfile.TemporaryDirectory(prefix="ladder-") as scratch:
        ruler = Ruler(*folders, args)
        rows = ruler.baselines(args.seeds[0])
        about = provenance(args, argv, ruler)
        for method in args.methods or available():
            for seed in args.seeds:
                print(f"{method}, seed {seed} ...", flush=True)
                rows.append(train_method(method, seed, Path(scratch), args, ruler))
                write(out, about, rows)
    print(markdown(about, rows))
    print(f"written: {out} and {out.with_suffix('.json')}")
    return 1 if any(row.error for row in rows) else 0


def write(out: Path, about: dict, rows: list[Row]) -> None:
    """Both files, after every row: an interrupted ladder keeps what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(about, rows))
    out.with_suffix(".json").write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


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
