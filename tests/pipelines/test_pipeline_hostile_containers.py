"""Tar and .beton files of a damaged disk or an enemy: no crash, nothing written, nothing read beyond them."""

import io
import os
import tarfile
from pathlib import Path

import bad_files
import numpy as np
import pytest
from bad_files import MARKS, first_epoch
from fastmim_pipelines.decode import CropReader
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonIndex, BetonWriter
from fastmim_pipelines.index import open_index
from fastmim_pipelines.spec import DataError
from fastmim_pipelines.tar import TarIndex

pytestmark = MARKS


def hostile_members(absolute: Path) -> list[tarfile.TarInfo]:
    members = []
    for name in (
        "../evil.jpg", "../../evil.jpg", f"{absolute}/evil.jpg", "a/../../evil.jpg", "./../evil.jpg", "//evil.jpg", "..\\evil.jpg",
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
    data = tmp_path / "deep" / "deeper" / "data"  # where two steps up is still seen
    data.mkdir(parents=True)
    monkeypatch.chdir(data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    members = hostile_members(tmp_path)
    assert len(members) >= 25
    with tarfile.open(data / "x.tar", "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"cos\nsystem"))
    with pytest.raises(DataError):
        first_epoch("tar", data, batch_size=1, on_bad_image="error")
    index = TarIndex(data)
    assert all(index.name(i).endswith(".jpg") for i in range(len(index)))
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "deeper", "data", "x.tar", ".fastmim-index.npz"}


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
