"""Tar shards: the same images as tarfile finds, whatever wrote them; damaged and hostile archives are told by name."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines import tar as tar_module
from fastmim_pipelines.decode import read_picture
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex, open_index
from fastmim_pipelines.spec import CropSpec, DataError
from fastmim_pipelines.tar import INDEX_NAME, TarIndex, TarLoader
from fastmim_pipelines.tar_scan import scan
from PIL import Image
from tar_files import write_tar

CROPS = (CropSpec((16, 18)),)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "fastmim"


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def shards_of(folder: Path, counts=(5, 1, 7)) -> Path:
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += [(f"{number:04d}.jpg", picture(number)), (f"{number:04d}.cls", str(number % 3).encode())]
            number += 1
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def contents(index) -> list[bytes]:
    found = []
    for span in index.encoded(range(len(index))):
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            found.append(file.read(span.size))
    return found


def batches(loader) -> list:
    try:
        return [(b.ids.tolist(), b.crops[0].numpy().tobytes()) for b in loader.epoch(0)]
    finally:
        loader.close()


# -- the index ---------------------------------------------------------------------------------------------------------


def test_index_lists_images_in_order_with_labels(tmp_path):
    index = TarIndex(shards_of(tmp_path))
    assert len(index) == 13 and contents(index) == [picture(i) for i in range(13)]
    assert [index.name(i) for i in range(13)] == [f"{i:04d}.jpg" for i in range(13)]
    assert index.path(5) == f"{tmp_path}/part-1.tar: 0005.jpg"
    assert index.labels.tolist() == [i % 3 for i in range(13)] and index.classes == ["0", "1", "2"]
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "cow"]))
    assert TarIndex(tmp_path).classes == ["cat", "dog", "cow"]
    assert TarIndex(tmp_path, classes=["cow", "dog", "cat", "ant"]).labels.tolist() == [2 - i % 3 for i in range(13)]
    with pytest.raises(DataError, match="expected only known classes"):
        TarIndex(tmp_path, classes=["dog"])
    assert len(TarIndex(tmp_path / "part-2.tar")) == 7


def test_index_takes_folders_for_classes_and_passes_over_other_members(tmp_path):
    write_tar(
        tmp_path / "deep" / "x.tar",
        [
            ("b/1.jpg", picture(1)), ("a/2.JPEG", picture(2)), ("a/.hidden.jpg", b""), ("__MACOSX/._2.txt", b""),
            (".git/3.jpg", b""), ("a/2.json", b"{}"), ("a/2.pkl", b"cos\nsystem\n"), ("a/2.pyd", b""), ("./b/4.png", b""),
        ],
    )  # fmt: skip
    index = TarIndex(tmp_path)
    assert [index.name(i) for i in range(len(index))] == ["b/1.jpg", "a/2.JPEG", "./b/4.png"]
    write_tar(tmp_path / "deep" / "x.tar", [("b/1.jpg", picture(1)), ("a/2.jpg", picture(2))])
    index = TarIndex(tmp_path)
    assert index.classes == ["a", "b"] and index.labels.tolist() == [1, 0]
    write_tar(tmp_path / "deep" / "x.tar", [("b/1.jpg", picture(1)), ("2.jpg", picture(2)), ("2.cls", b"x")])
    assert TarIndex(tmp_path).labels is None


def test_index_names_never_reach_the_disk(tmp_path):
    inside = tmp_path / "data"
    names = [
        "../evil.jpg",
        f"{tmp_path}/x/../evil2.jpg",
        "a/../../evil3.jpg",
        "pipe:touch evil.jpg",
        "file:///etc/passwd.jpg",
        "$(touch e).jpg",
        "a\n\x1b[31m.jpg",
    ]
    write_tar(inside / "x.tar", [(name, picture(0)) for name in names])
    index = TarIndex(inside)
    assert len(batches(TarLoader(index, CROPS, batch_size=7))) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["data", "x.tar", INDEX_NAME])
    with pytest.raises(DataError) as error:
        read_picture(b"", 3, index.path(6))
    assert str(error.value).isprintable()


def test_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    shards_of(tmp_path)
    first = TarIndex(tmp_path)
    assert (tmp_path / INDEX_NAME).is_file()
    scanned = []
    monkeypatch.setattr(tar_module, "scan", lambda shard: scanned.append(Path(shard).name) or scan(shard))
    again = TarIndex(tmp_path)
    assert not scanned and contents(again) == contents(first) and again.labels.tolist() == first.labels.tolist()
    os.utime(tmp_path / "part-1.tar", ns=(1, 1))
    TarIndex(tmp_path)
    assert scanned == ["part-0.tar", "part-1.tar", "part-2.tar"]
    write_tar(tmp_path / "part-3.tar", [("z.jpg", picture(99))])
    assert len(TarIndex(tmp_path)) == 14
    (tmp_path / "part-0.tar").unlink()
    assert len(TarIndex(tmp_path)) == 9


HARMS = {
    "offset": lambda table: put(table["offset"], 1 << 30),
    "a sum of more than 64 bits": lambda table: (
        put(table["offset"], (1 << 63) - 1),
        put(table["size"], (1 << 63) - 1),
    ),
    "shard": lambda table: put(table["shard"], 1 << 30),
    "ends": lambda table: put(table["ends"], 1 << 30),
    "pickle": lambda table: table.update(names=np.array([{"a": 1}], object)),
    "fractions": lambda table: table.update(offset=table["offset"].astype(float)),
    "rows too few": lambda table: table.update(label=table["label"][:-1]),
    "damage that is no list": lambda table: table.update(damage=np.frombuffer(b"7", np.uint8)),
    "damage that is no JSON": lambda table: table.update(damage=np.frombuffer(b"[", np.uint8)),
}


def put(column: np.ndarray, value: int) -> None:
    column[3] = value


@pytest.mark.parametrize("harm", ["garbage", "cut", *HARMS])
def test_index_files_are_not_believed(tmp_path, harm):
    shards_of(tmp_path)
    good = contents(TarIndex(tmp_path))
    place = tmp_path / INDEX_NAME
    if harm in HARMS:
        table = dict(np.load(place))
        HARMS[harm](table)
        np.savez(place, **table)
    else:
        place.write_bytes(b"PK\3\4garbage" if harm == "garbage" else place.read_bytes()[:-100])
    index = TarIndex(tmp_path)
    assert contents(index) == good and index.damage == []


def test_index_goes_to_the_cache_where_it_cannot_lie_beside_the_shards(tmp_path, cache, monkeypatch):
    shards_of(tmp_path / "data")
    (tmp_path / "data" / INDEX_NAME).mkdir()  # nothing can be written over a folder
    good = contents(TarIndex(tmp_path / "data"))
    assert len(list(cache.glob("*.npz"))) == 1
    monkeypatch.setattr(tar_module, "scan", lambda shard: 1 / 0)
    assert contents(TarIndex(tmp_path / "data")) == good


def test_index_of_nothing_is_refused(tmp_path):
    for name, reason in (("missing", "nothing there"), ("empty", "got none")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=reason) as error:
            TarIndex(tmp_path / name)
        assert error.value.exit_code == 2
    (tmp_path / "empty" / "x.tar.gz").touch()
    with pytest.raises(DataError, match=r"expected .tar files, not compressed, got only x.tar.gz"):
        TarIndex(tmp_path / "empty")
    write_tar(tmp_path / "other.tar", [("a.txt", b"")])
    with pytest.raises(DataError, match="in the tar files, got none"):
        TarIndex(tmp_path / "other.tar")


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_index_refuses_compressed_archives(tmp_path, mode, name):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match=f"got none; .*x.tar: compressed with {name}: decompress it") as error:
        TarIndex(tmp_path)
    assert error.value.exit_code == 2


def test_index_survives_pickling_and_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.open_files._MOST_OPEN", 2)
    index = TarIndex(shards_of(tmp_path, (1, 1, 1, 1, 1)))
    spans = index.encoded(range(5))
    assert sum(span.descriptor >= 0 for span in spans) == 2
    copy = pickle.loads(pickle.dumps(index))
    assert contents(copy) == contents(index)
    assert {span.descriptor for span in copy.encoded(range(5))}.isdisjoint(
        s.descriptor for s in spans if s.descriptor >= 0
    )
    assert batches(TarLoader(index, CROPS, batch_size=5)) == batches(TarLoader(copy, CROPS, batch_size=5))


# -- the loader --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"workers": 2}], ids=str)
def test_tar_batches_equal_those_of_a_folder(tmp_path, options):
    shards_of(tmp_path / "tar")
    for i in range(13):
        (tmp_path / f"{i:04d}.jpg").write_bytes(picture(i))
    index = FolderIndex(tmp_path)
    assert len(index) == 13
    expected = batches(FolderLoader(index, CROPS, batch_size=4, seed=3))
    assert batches(TarLoader(tmp_path / "tar", CROPS, batch_size=4, seed=3, **options)) == expected
    parts = [
        batches(TarLoader(tmp_path / "tar", CROPS, batch_size=4, seed=3, rank=r, world=2, **options)) for r in range(2)
    ]
    assert [parts[0][step][0] + parts[1][step][0] for step in range(3)] == [ids for ids, _ in expected]


def test_tar_runs_with_spawned_workers(tmp_path, monkeypatch):
    shards_of(tmp_path)
    expected = batches(TarLoader(tmp_path, CROPS, batch_size=6))
    monkeypatch.setattr("fastmim_pipelines.workers.start_method", lambda: "spawn")
    assert batches(TarLoader(tmp_path, CROPS, batch_size=6, workers=1)) == expected


def test_tar_reads_arrays(tmp_path):
    members = []
    for i in range(4):
        out = io.BytesIO()
        np.save(out, np.random.default_rng(i).integers(0, 256, (20, 30, 5), dtype=np.uint8))
        members.append((f"{i}.npy", out.getvalue()))
    write_tar(tmp_path / "x.tar", members)
    loader = TarLoader(tmp_path, CROPS, batch_size=4, in_chans=5)
    assert next(loader.epoch(0)).crops[0].shape == (4, 5, 16, 18)
    header = (
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000, 4000000000, 5), }"
    )
    write_tar(tmp_path / "x.tar", [("0.npy", header.ljust(127) + b"\n" + bytes(100))])
    with pytest.raises(DataError, match=r"expected the bytes of uint8 \(4000000000, 4000000000, 5\), got 100"):
        next(TarLoader(tmp_path, CROPS, batch_size=1, in_chans=5).epoch(0))


def test_tar_with_a_damaged_shard_is_told_or_used_as_far_as_it_goes(tmp_path):
    shards_of(tmp_path)
    shard = tmp_path / "part-2.tar"
    shard.write_bytes(shard.read_bytes()[:6000])
    for build in (
        lambda **options: TarLoader(tmp_path, CROPS, batch_size=4, **options),
        lambda **options: EvalReader(open_index(tmp_path), (16, 16), **options),
    ):
        with pytest.raises(DataError, match=r"part-2\.tar: cut short.*--on-bad-image skip") as error:
            build()
        assert error.value.path == str(shard)
        assert build(on_bad_image="skip").bad_images[0][0] == str(shard)
    index = TarIndex(tmp_path)
    assert 6 < len(index) < 13 and contents(index) == [picture(i) for i in range(len(index))]
    assert index.damage == TarIndex(tmp_path).damage and len(index.damage) == 1


@pytest.mark.parametrize("how", ["delete", "cut"])
def test_tar_shards_that_change_during_a_run_are_noticed(tmp_path, monkeypatch, how):
    monkeypatch.setattr("fastmim_pipelines.open_files._MOST_OPEN", 0)  # else a deleted file stays readable
    shards_of(tmp_path)
    loader = TarLoader(tmp_path, CROPS, batch_size=4, threads=2, workers=0)
    running = loader.epoch(0)
    next(running)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink() if how == "delete" else os.truncate(shard, 300)
    with pytest.raises(DataError, match=r"part-.*(cannot be read|was cut short)"):
        for epoch in range(1, 9):
            list(running)
            running = loader.epoch(epoch)
    loader.close()


def test_tar_pictures_that_are_damaged_are_substituted(tmp_path):
    members = [(f"{i}.jpg", picture(i) if i not in (2, 5) else b"<html>") for i in range(8)]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"x\.tar: [25]\.jpg: not an image of a known format.*\(sample [25]\)"):
        batches(TarLoader(tmp_path, CROPS, batch_size=8))
    loader = TarLoader(tmp_path, CROPS, batch_size=8, on_bad_image="skip")
    assert len(batches(loader)) == 1 and {path for path, _ in loader.bad_images} == {
        f"{tmp_path}/x.tar: {i}.jpg" for i in (2, 5)
    }


def test_open_index_recognizes_shards(tmp_path):
    shards_of(tmp_path / "shards")
    assert open_index(tmp_path / "shards").kind == open_index(tmp_path / "shards" / "part-0.tar").kind == "tar"
    shutil.copytree(tmp_path / "shards", tmp_path / "above" / "deep")
    assert open_index(tmp_path / "above", "tar").kind == "tar"
    (tmp_path / "above" / "x.jpg").write_bytes(picture(0))
    assert open_index(tmp_path / "above").kind == "folder"
