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
import time
from pathlib import Path

import bad_files
import numpy as np
import pytest
import torch
from bad_files import ANY, BAD, GOOD
from fastmim_pipelines import CropSpec, make_loader, native_decode
from fastmim_pipelines.decode import CropReader
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonIndex, BetonWriter
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.native_decode import FileSpan
from fastmim_pipelines.spec import DataError
from fastmim_pipelines.tar import TarIndex

CASES = bad_files.corpus()
PLAIN = 42  # good pictures among them
CROPS = (CropSpec((24, 20)), CropSpec((9, 9), view=1))
BATCH = 20
KINDS = ("folder", "tar", "ffcv", "hf")
SECONDS = 30  # the longest that anything may take here
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.timeout(2 * SECONDS),
]


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


def first_epoch(name: str, data, **options):
    """(ids and pixels of each batch, the loader, closed)."""
    options = {"batch_size": BATCH, "on_bad_image": "skip", "bad_image_budget": 2.0} | options
    loader, _ = make_loader(name, CROPS, data=data, **options)
    began = time.monotonic()
    try:
        batches = [(batch.ids.tolist(), [crop.cpu().numpy() for crop in batch.crops]) for batch in loader.epoch(0)]
    finally:
        loader.close()
    assert time.monotonic() - began < SECONDS
    return batches, loader


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


# -- what happens during a run -----------------------------------------------------------------------------------------


def gone(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


HARMS = (gone, emptied, cut, replaced_by_a_folder, replaced_by_a_pipe, replaced_by_a_link_to_itself)


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 3}, {"workers": 1}], ids=str)
def test_files_that_change_during_a_run_are_told_or_replaced(tmp_path, options):
    for i in range(48):
        (tmp_path / f"{i:02d}.jpg").write_bytes(bad_files.encoded(image=bad_files.picture(i)))
    index = FolderIndex(tmp_path)
    settings = {"batch_size": 6, "on_bad_image": "skip", "bad_image_budget": 1.0} | options
    loader, _ = make_loader("folder", CROPS, data=index, **settings)
    began = time.monotonic()
    running = loader.epoch(0)
    next(running)
    for i in range(0, 48, 4):
        HARMS[i // 4 % len(HARMS)](Path(index.path(i)))
    # What was read ahead is whole; after it, every changed file is replaced and told once.
    assert len(list(running)) == 7
    assert all(len(batch.ids) == 6 for batch in loader.epoch(1))
    loader.close()
    assert {path for path, _ in loader.bad_images} == {index.path(i) for i in range(0, 48, 4)}
    loader, _ = make_loader("folder", CROPS, data=index, **(settings | {"on_bad_image": "error"}))
    with pytest.raises(DataError, match=r"\d\d\.jpg: .*\(sample \d+\)"):
        list(loader.epoch(0))
    loader.close()
    assert time.monotonic() - began < SECONDS


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_files_that_may_not_be_read_are_told(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bad_files.encoded())
    (tmp_path / "a.jpg").chmod(0)
    loader, _ = make_loader("folder", CROPS, data=tmp_path, batch_size=1)
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read \(Permission denied\)"):
        next(loader.epoch(0))


def test_a_beton_file_that_is_cut_during_a_run_is_told(tmp_path):
    with BetonWriter(tmp_path / "x.beton", 48, LEAST_PAGE) as writer:
        for i in range(48):
            writer.add(bad_files.encoded(image=bad_files.picture(i)), -1, (1, 1))
    for options in ({"workers": 0}, {"threads": 2}, {"workers": 1}):
        copy = shutil.copy(tmp_path / "x.beton", tmp_path / "y.beton")
        loader, _ = make_loader("ffcv", CROPS, data=copy, batch_size=6, **options)
        running = loader.epoch(0)
        next(running)
        os.truncate(copy, LEAST_PAGE + 100)
        with pytest.raises(DataError, match=r"y\.beton: sample \d+: .*cut short.*--on-bad-image skip"):
            list(running) and list(loader.epoch(1))
        loader.close()


# -- containers --------------------------------------------------------------------------------------------------------


def hostile_members() -> list[tarfile.TarInfo]:
    members = []
    for name in (
        "../evil.jpg", "../../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", "./../evil.jpg", "//evil.jpg", "..\\evil.jpg",
        "C:\\evil.jpg", "a/b/../../../evil.jpg", "~/evil.jpg", "evil\0.jpg", "evil\n.jpg", "$(touch evil).jpg",
        "pipe:touch evil.jpg", "file:///etc/passwd.jpg", "|touch evil.jpg", "evil.pkl", "evil.pyd", "evil.pth",
    ):  # fmt: skip
        member = tarfile.TarInfo(name)
        member.size = 10
        members.append(member)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        for target in ("/etc/passwd", "../../evil"):
            member = tarfile.TarInfo(f"link-{kind[0]}.jpg")
            member.type, member.linkname = kind, target
            members.append(member)
    return members


def test_nothing_of_a_hostile_tar_file_reaches_the_disk(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    members = hostile_members()
    assert len(members) >= 25
    with tarfile.open(tmp_path / "data" / "x.tar", "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"cos\nsystem"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "data" / "cache"))
    before = sorted(Path("/tmp").glob("evil*"))
    with pytest.raises(DataError):
        first_epoch("tar", tmp_path / "data", batch_size=1, on_bad_image="error")
    index = TarIndex(tmp_path / "data")
    assert all(index.name(i).endswith(".jpg") for i in range(len(index)))
    assert {path.name for path in tmp_path.rglob("*")} == {"data", "x.tar", ".fastmim-index.npz"}
    assert sorted(Path("/tmp").glob("evil*")) == before


def test_a_tar_file_that_is_damaged_anywhere_is_told_and_its_rest_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = [bad_files.encoded(image=bad_files.picture(i)) for i in range(6)]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(pictures):
            member = tarfile.TarInfo(f"{i % 5}.jpg")  # one name twice
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data, rng, told = path.read_bytes(), np.random.default_rng(0), 0
    for trial in range(60):
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 600))
        harmed = data[:place] if trial % 2 else data[:place] + rng.bytes(length) + data[place + length :]
        path.write_bytes(harmed)
        for index_file in tmp_path.glob("*.npz"):
            index_file.unlink()
        try:
            index = open_index(path)
        except DataError as e:  # not one image is left
            assert e.exit_code == 2 and "x.tar" in str(e)
            continue
        told += bool(index.damage)
        assert index.damage or len(index) == 6 or place >= len(data) - 20 * 512
        batches, loader = first_epoch("tar", index, batch_size=1)
        assert len(batches) == len(index) or len(index) == 1
        assert all(bad.startswith(f"{path}") for bad, _ in loader.bad_images)
        for sample_id, span in enumerate(index.encoded(range(len(index)))):
            assert 0 <= span.offset <= span.offset + span.size <= len(harmed), sample_id
    assert told > 20


def test_a_beton_file_of_any_bytes_neither_crashes_nor_reads_beyond_it(tmp_path):
    """Some hundred mutations of header, metadata and table, decoded as a loader would."""
    path = tmp_path / "x.beton"
    with BetonWriter(path, 8, LEAST_PAGE) as writer:
        for i in range(8):
            image = bad_files.picture(i, (20, 16))
            raw = i % 2 == 0
            writer.add(image.tobytes() if raw else bad_files.encoded(image=image), i, (20, 16), is_raw=raw)
    size = path.stat().st_size
    table = size - 8 * 24
    reader = CropReader([((6, 7), "bicubic")], 3)
    rng, read = np.random.default_rng(0), 0
    extremes = [0, 1, 7, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, size, size - 1]
    with open(path, "r+b", buffering=0) as file:
        for _ in range(300):
            undo = []
            for _ in range(int(rng.integers(1, 4))):
                first, last = ((0, 24), (24, 2 * 1041 + 24), (2 * 1041 + 24, 2 * 1041 + 24 + 8 * 24), (table, size))[
                    rng.integers(4)
                ]
                width = int(rng.choice([1, 2, 4, 8]))
                place = int(rng.integers(first, last - width + 1))
                value = int(rng.choice(extremes)) if rng.integers(2) else int(rng.integers(256))
                undo.append((place, os.pread(file.fileno(), width, place)))
                os.pwrite(file.fileno(), (value % 256**width).to_bytes(width, "little"), place)
            try:
                index = BetonIndex(path)
            except DataError as e:
                assert e.exit_code == 2
            else:
                some = range(min(len(index), 16))
                spans = index.encoded(some)
                assert all(s.size == 0 or 0 <= s.offset < s.offset + s.size <= size for s in spans)
                out = np.zeros((len(some), 3, 6, 7), np.uint8)
                errors = reader.read(spans, [index.path(i) for i in some], lambda i, w, h: [(1, 1, w, h)], [out])
                read += sum(error is None for error in errors)
            for place, before in reversed(undo):
                os.pwrite(file.fileno(), before, place)
    assert read > 500 and len(BetonIndex(path)) == 8
