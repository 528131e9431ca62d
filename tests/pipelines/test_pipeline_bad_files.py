"""A corpus of odd and broken files through every loader: no crash, no wait, no pixel that is from elsewhere.

Where `datasets`, DALI or nvImageCodec are not installed, their loaders are left out.
"""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import bad_files
import numpy as np
import pytest
import torch
from bad_files import ANY, BAD, CROPS, GOOD, MARKS, SECONDS, first_epoch
from fastmim_pipelines import make_loader, native_decode
from fastmim_pipelines.decode import CropReader
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonWriter
from fastmim_pipelines.native_decode import FileSpan
from fastmim_pipelines.spec import DataError

pytestmark = MARKS

CASES = bad_files.corpus()
PLAIN = 42  # good pictures among them

KINDS = ("folder", "tar", "ffcv", "hf")


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def files_of_the_set() -> list[tuple[str, bytes]]:
    plain = [(f"{900 + i}.jpg", bad_files.encoded(image=bad_files.picture(100 + i))) for i in range(PLAIN)]
    return [(case.name, case.data) for case in CASES] + plain


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """The same files as each loader wants them, in the same order."""
    root = tmp_path_factory.mktemp("bad")
    files = files_of_the_set()
    (root / "folder").mkdir()
    (root / "tar").mkdir()
    with (
        tarfile.open(root / "tar" / "x.tar", "w") as tar,
        BetonWriter(root / "x.beton", len(files), LEAST_PAGE) as beton,
    ):
        for name, data in files:
            (root / "folder" / name).write_bytes(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            beton.add(data or b"\0", -1, (1, 1))  # it takes no empty ones
    found = {"folder": root / "folder", "tar": root / "tar", "ffcv": root / "x.beton"}
    if has("datasets"):
        import datasets

        features = datasets.Features({"image": datasets.Image(decode=False)})
        rows = {"image": [{"bytes": data, "path": None} for _, data in files]}
        datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image()).to_parquet(
            root / "x.parquet"
        )
        found["hf"] = root / "x.parquet"
    return found


def poison(monkeypatch, byte: int) -> None:
    """Fresh memory of pixels holds this byte."""
    fresh = torch.empty

    def poisoned(*args, **options):
        tensor = fresh(*args, **options)
        return tensor.fill_(byte) if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_same(a, b) -> None:
    for (ids, crops), (other_ids, other_crops) in zip(a, b, strict=True):
        assert ids == other_ids
        for crop, other in zip(crops, other_crops, strict=True):
            assert np.array_equal(crop, other)


# -- each file ---------------------------------------------------------------------------------------------------------


def test_corpus_is_large_and_is_judged_alike_by_every_decoder_and_source(tmp_path, monkeypatch):
    """The verdict, the reason and the pixels: from memory, files and parts of files, by Pillow and natively."""
    assert len(CASES) >= 120 and sum(case.verdict == BAD for case in CASES) >= 60
    datas, names = [case.data for case in CASES], [case.name for case in CASES]
    offsets = np.cumsum([0, *map(len, datas)]).tolist()
    (tmp_path / "all").write_bytes(b"".join(datas))
    for name, data in zip(names, datas):
        (tmp_path / name).write_bytes(data)
    sources = {
        "bytes": datas,
        "paths": [str(tmp_path / name) for name in names],
        "spans": [FileSpan(str(tmp_path / "all"), offset, len(data)) for offset, data in zip(offsets, datas)],
    }
    boxes = lambda i, width, height: [(width // 5, height // 4, max(1, width // 2), max(1, height // 2))]  # noqa: E731
    seen = {}
    for decoder in ("pillow", "native") if native_decode.load()[0] else ("pillow",):
        monkeypatch.setenv(native_decode.VARIABLE, decoder)
        for source, images in sources.items():
            for byte in (0, 173):
                out = np.full((len(images), 3, 12, 14), byte, np.uint8)
                errors = CropReader([((12, 14), "bicubic")], 3, threads=2).read(images, names, boxes, [out])
                # An empty span is no file to speak of.
                reasons = [None if e is None else "empty" if not datas[i] else e.reason for i, e in enumerate(errors)]
                seen[decoder, source, byte] = reasons, [out[i] for i, e in enumerate(errors) if e is None]
    (reasons, pixels), *others = seen.values()
    for case, reason in zip(CASES, reasons):
        assert case.verdict == ANY or (reason is None) == (case.verdict == GOOD), (case.name, reason)
        assert reason is None or (reason.isprintable() and reason)
    for other_reasons, other_pixels in others:
        assert other_reasons == reasons
        assert all(np.array_equal(a, b) for a, b in zip(pixels, other_pixels, strict=True))


# -- each loader -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(sets):
    return first_epoch("folder", sets["folder"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"workers": 2}], ids=str)
def test_every_loader_gives_the_same_from_the_same_bad_files(sets, expected, kind, options, monkeypatch):
    """Also the same substitutes, whoever decodes; fresh memory is poisoned, so that nothing else can be in a batch."""
    if kind not in sets:
        pytest.skip("datasets is not installed")
    for byte in (0, 255):
        with monkeypatch.context() as patch:
            poison(patch, byte)
            batches, loader = first_epoch(kind, sets[kind], **options)
        assert_same(batches, expected[0])
        assert len(loader.bad_images) == len(expected[1].bad_images)
    reasons = [reason for _, reason in expected[1].bad_images]
    # Empty files are told in other words where they are parts of files.
    assert all("empty" in a for a, (_, b) in zip(reasons, loader.bad_images) if a != b)
    refused = {Path(path).name for path, _ in expected[1].bad_images}
    verdicts = {case.name: case.verdict for case in CASES}
    assert {verdicts[name] for name in refused} <= {BAD, ANY}
    assert refused >= {case.name for case in CASES if case.verdict == BAD} or len(refused) > 60


@pytest.mark.parametrize("name", ["dali", "nvimgcodec"])
def test_decoders_of_others_survive_the_same_files(sets, expected, name, monkeypatch):
    if not has(f"nvidia.{name}"):
        pytest.skip(f"{name} is not installed")
    runs = []
    for byte in (0, 255):
        with monkeypatch.context() as patch:
            poison(patch, byte)
            runs.append(first_epoch(name, sets["folder"]))
    assert_same(runs[0][0], runs[1][0])
    certain = {case.name for case in CASES if case.verdict == BAD}
    ours, theirs = (
        {Path(path).name for path, _ in loader.bad_images} & certain for loader in (expected[1], runs[0][1])
    )
    assert ours == theirs
    # Pixels near ours, but where a damaged file is one to them and none to us: few.
    distances = [np.abs(a.astype(int) - b).mean() for a, b in zip(_samples(runs[0][0]), _samples(expected[0]))]
    assert np.mean(np.array(distances) < 4) > 0.85


def _samples(batches):
    return [sample for _, crops in batches for sample in crops[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"workers": 1}], ids=str)
def test_error_policy_names_the_first_bad_file_and_budget_ends_a_run(sets, kind, options):
    if kind not in sets:
        pytest.skip("datasets is not installed")
    with pytest.raises(
        DataError, match=r"\(sample \d+\); repair or remove the file, or .*--on-bad-image skip"
    ) as error:
        first_epoch(kind, sets[kind], on_bad_image="error", **options)
    assert (
        error.value.exit_code == 4 and str(error.value).isprintable() and error.value.path.startswith(str(sets[kind]))
    )
    with pytest.raises(DataError, match=r"images were unusable, more than 0\.10% and 10; check the data") as error:
        first_epoch(kind, sets[kind], bad_image_budget=0.001, **options)
    assert error.value.exit_code == 4


def test_odd_names_are_told_as_one_line(tmp_path):
    names = ["a\nb.jpg", "c\x1b[31m.jpg", "d'\"$(touch x).jpg", "ü名前.jpg", "e" * 200 + ".jpg"]
    for name in names:
        (tmp_path / name).write_bytes(b"<html>")
    loader, _ = make_loader("folder", CROPS, data=tmp_path, batch_size=5)
    with pytest.raises(DataError) as error:
        next(loader.epoch(0))
    assert str(error.value).isprintable()


MEMORY = """
import sys
from pathlib import Path
from fastmim_pipelines import CropSpec, make_loader
def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0])
def epoch(data):
    loader, _ = make_loader("auto", (CropSpec((32, 32)),), data=data, batch_size=1, on_bad_image="skip", bad_image_budget=100.0, threads=2)
    count = sum(1 for _ in loader.epoch(0))
    loader.close()
    return count, len(loader.bad_images)
epoch(sys.argv[1])
before = peak()
for data in sys.argv[2:]:
    print(*epoch(data))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_are_refused_by_their_headers(tmp_path):
    bombs = bad_files.bombs()
    for folder in ("plain", "bombs", "tar"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        (tmp_path / "plain" / f"{i}.jpg").write_bytes(bad_files.encoded(image=bad_files.picture(i, (500, 375))))
    shutil.copytree(tmp_path / "plain", tmp_path / "bombs", dirs_exist_ok=True)
    for name, data in bombs.items():
        (tmp_path / "bombs" / name).write_bytes(data)
    with tarfile.open(tmp_path / "tar" / "x.tar", "w") as tar:
        for path in sorted((tmp_path / "bombs").iterdir()):
            tar.add(path, path.name)
    run = [sys.executable, "-c", MEMORY, *(str(tmp_path / folder) for folder in ("plain", "bombs", "tar"))]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(run, capture_output=True, text=True, timeout=SECONDS, env=env)
    *counts, growth = done.stdout.split("\n")[:3] or [""]
    assert counts == [f"{len(bombs) + 4} {len(bombs)}"] * 2, done.stderr
    assert int(growth) < 64 << 10  # kB
