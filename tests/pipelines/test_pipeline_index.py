"""The scan of a folder: depth, order, labels, links, odd names and clear errors."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines.index import EXTENSIONS, FolderIndex
from fastmim_pipelines.spec import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(index: FolderIndex) -> list[str]:
    return [os.path.relpath(index.path(i), index.root) for i in range(len(index))]


def test_index_finds_images_at_any_depth_sorted(tmp_path):
    touch(
        tmp_path, "b/2.jpg", "b/10.png", "a/deep/er/x.WEBP", "a-b/y.TIFF", "a/readme.txt", "c/notes.md", "b/z.jpg.part"
    )
    index = FolderIndex(tmp_path)
    assert names(index) == ["a/deep/er/x.WEBP", "a-b/y.TIFF", "b/10.png", "b/2.jpg"]
    assert index.classes == ["a", "a-b", "b"] and index.labels.tolist() == [0, 1, 2, 2]


def test_index_knows_all_extensions_in_any_case(tmp_path):
    touch(tmp_path, *(f"{i}{ext.upper() if i % 2 else ext}" for i, ext in enumerate(EXTENSIONS)))
    assert len(FolderIndex(tmp_path)) == len(EXTENSIONS) == 8


def test_index_of_flat_images_has_no_labels(tmp_path):
    index = FolderIndex(touch(tmp_path, "1.jpg", "2.jpg"))
    assert index.labels is None and index.classes == [] and len(index) == 2
    mixed = FolderIndex(touch(tmp_path, "cats/3.jpg"))
    assert mixed.labels is None and len(mixed) == 3


def test_index_skips_hidden_files_and_folders(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/2.jpg", "a/.thumbnails/3.jpg")
    assert names(FolderIndex(tmp_path)) == ["a/1.jpg"]


def test_index_follows_links_once_around_a_cycle(tmp_path):
    touch(tmp_path / "elsewhere", "1.jpg")
    touch(tmp_path / "data", "a/2.jpg")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data/folder.jpg").mkdir()
    assert names(FolderIndex(tmp_path / "data")) == ["a/2.jpg", "linked/1.jpg"]
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert names(FolderIndex(tmp_path / "link")) == ["a/2.jpg", "linked/1.jpg"]


@pytest.mark.parametrize(
    "name",
    ["two\nlines.jpg", "名前.jpg", "a b'\"\\.jpg", "l" * 251 + ".jpg", b"latin\xe9.jpg"],
    ids=["newline", "unicode", "quotes", "255 characters", "not utf-8"],
)
def test_index_keeps_odd_names(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name if isinstance(name, bytes) else name.encode())
    open(path, "wb").close()
    index = FolderIndex(tmp_path)
    assert os.fsencode(index.path(0)) == path and os.path.exists(index.path(0))


def test_index_numbers_labels_by_given_classes(tmp_path):
    touch(tmp_path, "b/1.jpg", "c/2.jpg")
    index = FolderIndex(tmp_path, classes=["a", "b", "c"])
    assert index.labels.tolist() == [1, 2] and index.classes == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"got also \['c'\]") as error:
        FolderIndex(tmp_path, classes=["a", "b"])
    assert error.value.exit_code == 2


def test_index_survives_pickling(tmp_path):
    index = pickle.loads(pickle.dumps(FolderIndex(touch(tmp_path, "a/1.jpg", "b/2.jpg"))))
    assert names(index) == ["a/1.jpg", "b/2.jpg"] and np.array_equal(index.labels, [0, 1])


def test_index_errors_are_one_line_with_the_path(tmp_path):
    touch(tmp_path, "empty/notes.txt", "file.jpg")
    for name, reason in (("missing", "nothing there"), ("empty", "got none"), ("file.jpg", "a file")):
        with pytest.raises(DataError, match=reason) as error:
            FolderIndex(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        assert error.value.exit_code == 2


def test_index_names_an_unreadable_folder(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def forbid(folder):  # chmod does not stop root
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", forbid)
    with pytest.raises(DataError, match=r"/b: cannot be listed \(Permission denied\)"):
        FolderIndex(tmp_path)
