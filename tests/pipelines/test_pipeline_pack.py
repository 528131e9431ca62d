"""Packing and verifying: nothing gets lost, changed or reordered unasked; what is damaged is told."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines import CropSpec, make_loader
from fastmim_pipelines.decode import read_bytes, read_picture
from fastmim_pipelines.index import FolderIndex, open_index, without
from fastmim_pipelines.pack import new_size, pack, read_checksums
from fastmim_pipelines.spec import DataError
from fastmim_pipelines.verify import verify
from PIL import Image


def quiet(line: str) -> None:
    pass


@pytest.fixture
def mixed(demo_set, tmp_path) -> Path:
    """Some training pictures, a few of them PNG or CMYK, two of them damaged (samples 3 and 11)."""
    folder = tmp_path / "mixed"
    for path in sorted((demo_set / "train").rglob("*.jpg"))[::3]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    index = FolderIndex(folder)
    for i in (1, 7):
        Image.open(index.path(i)).save(str(Path(index.path(i)).with_suffix(".png")))
        Path(index.path(i)).unlink()
    Image.open(index.path(5)).convert("CMYK").save(index.path(5), "JPEG")
    index = FolderIndex(folder)
    Path(index.path(3)).write_bytes(Path(index.path(3)).read_bytes()[:-300])
    Path(index.path(11)).write_bytes(b"")
    return folder


def image_of(index, i) -> np.ndarray:
    return np.asarray(read_picture(index.encoded([i])[0], 3, index.path(i)).planes[0])


def out_of(tmp_path: Path, to: str) -> Path:
    return tmp_path / ("out.beton" if to == "beton" else "out")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to", ["tar", "beton"])
def test_pack_keeps_bytes_order_and_labels(mixed, tmp_path, to, workers):
    source, lines = open_index(mixed), []
    result = pack(source, out_of(tmp_path, to), to=to, shard_bytes=60_000, workers=workers, progress=lines.append)
    kept = [i for i in range(len(source)) if i not in (3, 11)]
    packed = open_index(out_of(tmp_path, to))
    assert packed.kind == {"tar": "tar", "beton": "ffcv"}[to] and len(packed) == result.images == len(kept)
    assert packed.classes == source.classes and packed.labels.tolist() == source.labels[kept].tolist()
    for i, original in enumerate(kept):
        assert np.array_equal(image_of(packed, i), image_of(source, original))
        if source.path(original).endswith("jpg") or to == "tar":
            assert bytes(read_bytes(packed.encoded([i])[0])) == Path(source.path(original)).read_bytes()
    assert [(bad.sample_id, bad.path) for bad in result.bad] == [(3, source.path(3)), (11, source.path(11))]
    assert any("left out" in line and source.path(11) in line for line in lines) and "100 %" in " ".join(lines)
    assert len(result.files) == (len(list(out_of(tmp_path, to).glob("*.tar"))) if to == "tar" else 1)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.spool"))
    size, _ = read_checksums(packed.root)
    assert size.tolist() == [span.size for span in packed.encoded(range(len(packed)))] and size.sum() == result.bytes


def test_pack_names_images_without_a_name_by_what_they_are(tmp_path, monkeypatch):
    """Rows of a table are called by their numbers; a tar's reader looks at endings."""
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for i, kind in enumerate(kinds):
        image.save(tmp_path / f"{i}.jpg", kind)
    source = FolderIndex(tmp_path)
    monkeypatch.setattr(FolderIndex, "name", lambda self, index: str(index))
    pack(source, tmp_path / "out", to="tar", workers=0, progress=quiet)
    packed = open_index(tmp_path / "out")
    assert [packed.name(i) for i in range(len(packed))] == ["0.jpg", "1.png", "2.webp", "3.bmp", "4.tif"]


@pytest.mark.parametrize("to", ["tar", "beton"])
@pytest.mark.parametrize(("resize", "longest"), [(("max", 64), 64), (("short", 64), None), (None, None)], ids=str)
def test_pack_makes_smaller_jpegs(mixed, tmp_path, to, resize, longest):
    source = open_index(mixed)
    pack(source, out_of(tmp_path, to), to=to, resize=resize, quality=None if resize else 40, workers=0, progress=quiet)
    packed = open_index(out_of(tmp_path, to))
    kept = [i for i in range(len(source)) if i not in (3, 11)]
    for i, original in enumerate(kept):
        before = image_of(source, original)
        data = bytes(read_bytes(packed.encoded([i])[0]))
        after = Image.open(io.BytesIO(data))
        assert after.format == "JPEG" and after.size == new_size(before.shape[1::-1], resize or ("max", 10**6))
        if longest:
            assert max(after.size) <= longest
        expected = Image.fromarray(before).resize(after.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(after.convert("RGB"), int) - np.asarray(expected)).mean() < (
            25 if resize is None else 8
        )


def test_new_size_never_grows():
    assert new_size((500, 375), ("max", 256)) == (256, 192)
    assert new_size((500, 375), ("short", 256)) == (341, 256)
    assert new_size((100, 50), ("max", 256)) == new_size((100, 50), ("short", 256)) == (100, 50)
    assert new_size((3000, 1), ("max", 10)) == (10, 1)


def test_pack_writes_what_webdataset_expects(mixed, tmp_path):
    """Each sample's members lie together and share the name up to the first dot."""
    with_dots = mixed / "disc-stripes"
    source = next(with_dots.glob("*.jpg"))
    shutil.copy(source, with_dots / "with.two.dots.jpg")
    shutil.copy(source, with_dots / "with_two.dots.jpeg")
    pack(open_index(mixed), tmp_path / "out", to="tar", workers=0, progress=quiet)
    names = []
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            names += [member.name for member in tar]
    keys = [name[: name.index(".", name.rindex("/"))] for name in names]
    assert keys[0::2] == keys[1::2] and len(set(keys)) == len(keys) // 2
    assert all(name.endswith(".cls") for name in names[1::2])


@pytest.mark.parametrize("to", ["tar", "beton"])
def test_pack_from_packed_data(mixed, tmp_path, to):
    first, second = tmp_path / "first.beton", out_of(tmp_path, to)
    pack(open_index(mixed), first, to="beton", workers=0, progress=quiet)
    result = pack(open_index(first), second, to=to, workers=0, progress=quiet)
    a, b = open_index(first), open_index(second)
    assert not result.bad and a.classes == b.classes and a.labels.tolist() == b.labels.tolist()
    assert all(np.array_equal(image_of(a, i), image_of(b, i)) for i in range(len(a)))


def test_pack_keeps_arrays_in_tar_files(tmp_path):
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / f"{i}.npy", np.full((9, 8, 5), i, np.uint8))
    pack(open_index(tmp_path / "in"), tmp_path / "out", to="tar", in_chans=5, workers=0, progress=quiet)
    loader, _ = make_loader("auto", (CropSpec((4, 4)),), data=tmp_path / "out", batch_size=3, in_chans=5)
    batch = next(loader.epoch(0))
    assert [int(crop.max()) for crop in batch.crops[0]] == batch.ids.tolist()
    with pytest.raises(ValueError, match="in_chans: expected 1 or 3"):
        pack(open_index(tmp_path / "in"), tmp_path / "x.beton", to="beton", in_chans=5, workers=0, progress=quiet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "zip"}, "to: expected tar or beton, got 'zip'"),
        ({"resize": ("long", 5)}, "resize: expected"),
        ({"resize": ("max", 0)}, "resize: expected"),
        ({"quality": 0}, "quality: expected 1..100, got 0"),
        ({"quality": 101}, "quality: expected 1..100, got 101"),
    ],
    ids=str,
)
def test_pack_checks_its_arguments(demo_set, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pack(open_index(demo_set / "val"), tmp_path / "x", **{"to": "tar", "workers": 0, **options})
    assert list(tmp_path.iterdir()) == []


def test_pack_overwrites_nothing_and_leaves_nothing_half_done(demo_set, tmp_path, monkeypatch):
    index = open_index(demo_set / "val")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "x.beton").touch()
    for out, to in ((tmp_path / "full", "tar"), (tmp_path / "x.beton", "beton"), (tmp_path / "x.beton", "tar")):
        with pytest.raises(ValueError, match="out: expected nothing at"):
            pack(index, out, to=to, workers=0, progress=quiet)
    for i in range(2):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / f"{i}.jpg").touch()
    with pytest.raises(DataError, match="expected usable images, got none"):
        pack(open_index(tmp_path / "bad"), tmp_path / "y.beton", to="beton", workers=0, progress=quiet)

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    for out, to in ((tmp_path / "t", "tar"), (tmp_path / "z.beton", "beton")):
        with pytest.raises(KeyboardInterrupt):
            pack(index, out, to=to, workers=0, progress=interrupt)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".spool", ".tar")]
    assert not (tmp_path / "z.beton").exists() and not (tmp_path / "y.beton").exists()


# -- verifying ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_names_each_bad_image_and_writes_a_list(mixed, tmp_path, workers):
    index, lines = open_index(mixed), []
    result = verify(index, list_path=tmp_path / "bad.jsonl", workers=workers, progress=lines.append)
    assert result.images == len(index) and not result.has_checksums and not result.damage
    assert [bad.sample_id for bad in result.bad] == [3, 11]
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in listed] == [index.name(3), index.name(11)] and all(
        entry["reason"] for entry in listed
    )
    assert f"verify: {index.path(11)}: the file is empty" in lines
    assert lines[-1] == f"verify: {len(index)} images read, 2 of no use"


def test_listed_images_are_left_out_by_loaders(mixed, tmp_path):
    index = open_index(mixed)
    verify(index, list_path=tmp_path / "bad.jsonl", workers=0, progress=quiet)
    good = without(index, tmp_path / "bad.jsonl")
    assert len(good) == len(index) - 2 and good.classes == index.classes
    assert good.labels.tolist() == np.delete(index.labels, [3, 11]).tolist()
    assert good.path(3) == index.path(4) and good.name(10) == index.name(12)
    for workers in (0, 1):
        loader, reason = make_loader("auto", (CropSpec((8, 8)),), data=good, batch_size=len(good), workers=workers)
        assert reason.startswith("folder: ") and sorted(next(loader.epoch(0)).ids.tolist()) == list(range(len(good)))
        loader.close()
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"name": index.name(i)}) + "\n" for i in range(len(index))))
    with pytest.raises(DataError, match="no image is left"):
        without(index, tmp_path / "all.jsonl")
    for text in ("x", "{}", "[1]"):
        (tmp_path / "odd.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"odd\.jsonl: expected one JSON object") as error:
            without(index, tmp_path / "odd.jsonl")
        assert error.value.exit_code == 2
    with pytest.raises(DataError, match="gone"):
        without(index, tmp_path / "gone")


@pytest.mark.parametrize("to", ["tar", "beton"])
def test_verify_compares_checksums(demo_set, tmp_path, to):
    out = out_of(tmp_path, to)
    pack(open_index(demo_set / "val"), out, to=to, workers=0, progress=quiet)
    index = open_index(out)
    result = verify(index, workers=0, progress=quiet)
    assert result.has_checksums and not result.bad
    span = index.encoded([6])[0]
    with open(span.path, "r+b") as file:  # in the pixels: no decoder would notice
        file.seek(span.offset + span.size - 40)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    result = verify(open_index(out), workers=0, progress=quiet)
    assert [(bad.sample_id, bad.reason) for bad in result.bad] == [(6, "its bytes are not those that were packed")]
    Path(read_place(out)).write_bytes(b"x")
    assert not verify(open_index(out), workers=0, progress=quiet).has_checksums


def read_place(out: Path) -> Path:
    return out / "checksums.npz" if out.is_dir() else out.with_suffix(".checksums.npz")


def test_verify_tells_of_damaged_shards(demo_set, tmp_path):
    result = pack(open_index(demo_set / "val"), tmp_path / "out", to="tar", workers=0, progress=quiet)
    shard = Path(result.files[0])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    lines = []
    verified = verify(open_index(tmp_path / "out"), workers=0, progress=lines.append)
    assert verified.damage[0][0] == str(shard) and verified.images < result.images and not verified.bad
    assert any(str(shard) in line and "cut short" in line for line in lines)
    assert any("the checksums are those of 20 images" in line for line in lines) and not verified.has_checksums
