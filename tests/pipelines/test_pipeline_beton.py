"""FFCV's files: ours are read back, FFCV's own too where it is installed, and no bytes make the reader stumble."""

import contextlib
import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from fastmim_pipelines import ffcv_file
from fastmim_pipelines.decode import read_picture
from fastmim_pipelines.ffcv_file import LEAST_PAGE, BetonIndex, BetonLoader, BetonWriter
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.spec import CropSpec, DataError
from PIL import Image

CROPS = (CropSpec((16, 18)),)
COUNT = 12


def pixels(number: int) -> np.ndarray:
    height, width = 10 + number, 34 - number
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(number)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(path: Path, count: int = COUNT, raw: bool = False) -> Path:
    with BetonWriter(path, count, LEAST_PAGE) as writer:
        for i in range(count):
            sides = pixels(i).shape[1::-1]
            writer.add(pixels(i).tobytes() if raw else jpeg(i), i % 4, sides, is_raw=raw)
    return path


def batches(loader) -> list:
    try:
        return [(b.ids.tolist(), b.crops[0].numpy().tobytes()) for b in loader.epoch(0)]
    finally:
        loader.close()


def test_beton_gives_back_what_was_written(tmp_path):
    for raw in (False, True):
        index = BetonIndex(write(tmp_path / "x.beton", raw=raw))
        assert len(index) == COUNT and index.labels.tolist() == [i % 4 for i in range(COUNT)]
        assert index.classes == ["0", "1", "2", "3"] and index.path(3) == f"{tmp_path}/x.beton: sample 3"
        for i, span in enumerate(index.encoded(range(COUNT))):
            picture = read_picture(span, 3, index.path(i))
            expected = pixels(i) if raw else np.asarray(Image.open(io.BytesIO(jpeg(i))))
            assert np.array_equal(np.asarray(picture.planes[0]), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["x.beton"]


def test_beton_writer_puts_no_image_across_pages(tmp_path):
    sizes = [LEAST_PAGE // 2 - 7, LEAST_PAGE // 2, 100, LEAST_PAGE, 5, LEAST_PAGE - 5, 1]
    with BetonWriter(tmp_path / "x.beton", len(sizes), LEAST_PAGE) as writer:
        for i, size in enumerate(sizes):
            writer.add(bytes([i]) * size, i, (1, 1))
    data = (tmp_path / "x.beton").read_bytes()
    for i, span in enumerate(BetonIndex(tmp_path / "x.beton").encoded(range(len(sizes)))):
        assert span.size == sizes[i] and data[span.offset : span.offset + span.size] == bytes([i]) * sizes[i]
        assert span.offset // LEAST_PAGE == (span.offset + span.size - 1) // LEAST_PAGE and span.offset >= LEAST_PAGE
    assert struct.unpack("<HHI", data[:8]) == (2, 2, LEAST_PAGE)


def test_beton_writer_refuses_and_leaves_nothing_half_done(tmp_path):
    path = tmp_path / "x.beton"
    for samples, page in ((0, LEAST_PAGE), (1, 1000), (1, LEAST_PAGE + 1), (1, 1 << 32)):
        with pytest.raises(ValueError, match="expected"):
            BetonWriter(path, samples, page)
    with pytest.raises(ValueError, match="expected at most a page"), BetonWriter(path, 1, LEAST_PAGE) as writer:
        writer.add(bytes(LEAST_PAGE + 1), 0, (1, 1))
    with pytest.raises(ValueError, match="and at least one, got 0"), BetonWriter(path, 1, LEAST_PAGE) as writer:
        writer.add(b"", 0, (1, 1))
    with pytest.raises(ValueError, match="samples: expected 3, got 1"), BetonWriter(path, 3, LEAST_PAGE) as writer:
        writer.add(b"a", 0, (1, 1))
    assert list(tmp_path.iterdir()) == []


def test_beton_labels_take_names_from_beside(tmp_path):
    write(tmp_path / "x.beton")
    (tmp_path / "x.classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    assert BetonIndex(tmp_path / "x.beton").classes == ["a", "b", "c", "d"]
    index = BetonIndex(tmp_path / "x.beton", classes=["d", "c", "b", "a"])
    assert index.labels.tolist() == [3 - i % 4 for i in range(COUNT)]
    with pytest.raises(DataError, match="expected only known classes"):
        BetonIndex(tmp_path / "x.beton", classes=["a"])
    with BetonWriter(tmp_path / "y.beton", 1, LEAST_PAGE) as writer:
        writer.add(jpeg(0), -1, (34, 10))
    index = BetonIndex(tmp_path / "y.beton")
    assert index.labels is None and index.classes == []


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"workers": 1}], ids=str)
def test_beton_batches_equal_those_of_a_folder(tmp_path, options):
    for i in range(COUNT):
        (tmp_path / f"{i:02d}.jpg").write_bytes(jpeg(i))
    expected = batches(FolderLoader(tmp_path, CROPS, batch_size=4, seed=5))
    path = write(tmp_path / "x.beton")
    assert batches(BetonLoader(path, CROPS, batch_size=4, seed=5, **options)) == expected
    index = pickle.loads(pickle.dumps(BetonIndex(path)))
    assert batches(BetonLoader(index, CROPS, batch_size=4, seed=5)) == expected
    raw = batches(BetonLoader(write(tmp_path / "raw.beton", raw=True), CROPS, batch_size=4, seed=5, **options))
    assert [ids for ids, _ in raw] == [ids for ids, _ in expected] and raw != expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short"),
        (b"<html>404</html>" * 20, "version"),
        (struct.pack("<HHIQQ", 1, 2, 1 << 21, 5, 0), "version 1"),
        (struct.pack("<HHIQQ", 2, 0, 1 << 21, 5, 0), "0 fields and 5 samples"),
        (struct.pack("<HHIQQ", 2, 2, 1 << 21, 0, 0), "2 fields and 0 samples"),
        (struct.pack("<HHIQQ", 2, 65535, 1 << 21, 5, 0), "65535 fields"),
        (struct.pack("<HHIQQ", 2, 1, 1 << 21, 5, 0), "cut short"),
    ],
    ids=str,
)
def test_beton_headers_are_checked(tmp_path, data, reason):
    (tmp_path / "x.beton").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.beton: .*{reason}.*; expected a \.beton file of FFCV") as error:
        BetonIndex(tmp_path / "x.beton")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_beton_that_is_missing_or_a_folder_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "gone.beton"):
        with pytest.raises(DataError, match="cannot be read"):
            BetonIndex(path)


def test_beton_without_images_or_with_unknown_fields_is_refused(tmp_path):
    data = bytearray(write(tmp_path / "x.beton").read_bytes())
    for kind, reason in (
        (0, "expected a field with images, got 'image', 'label'"),
        (255, "unknown type 255"),
        (9, "unknown type 9"),
    ):
        data[24] = kind
        (tmp_path / "x.beton").write_bytes(data)
        with pytest.raises(DataError, match=reason):
            BetonIndex(tmp_path / "x.beton")


def changed(data: bytes, sample: int, **fields) -> bytes:
    """The file with other metadata of one sample."""
    row = np.dtype([("f0", ffcv_file._IMAGE), ("f1", "<i8")], align=True)
    start = ffcv_file._HEADER.itemsize + 2 * ffcv_file._FIELD.itemsize
    rows = np.frombuffer(data[start : start + COUNT * row.itemsize], row).copy()
    for name, value in fields.items():
        rows[sample]["f0"][name] = value
    return data[:start] + rows.tobytes() + data[start + rows.nbytes :]


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        (False, {"place": 0}),
        (False, {"place": 2**64 - 1}),
        (False, {"place": 2**63}),
        (False, {"mode": 7}),
        (True, {"width": 65535, "height": 65535}),
        (True, {"width": 0}),
        (True, {"height": 1000}),
    ],
    ids=str,
)
def test_beton_with_an_impossible_place_loses_that_image_only(tmp_path, raw, fields):
    path = write(tmp_path / "x.beton", raw=raw)
    path.write_bytes(changed(path.read_bytes(), 3, **fields))
    with pytest.raises(DataError, match=r"x\.beton: sample 3: .*does not tell a possible place.*\(sample 3\)"):
        batches(BetonLoader(path, CROPS, batch_size=COUNT))
    loader = BetonLoader(path, CROPS, batch_size=COUNT, on_bad_image="skip")
    assert len(batches(loader)) == 1 and [bad for bad, _ in loader.bad_images] == [f"{path}: sample 3"]


def test_beton_table_is_checked(tmp_path):
    path = write(tmp_path / "x.beton")
    data = path.read_bytes()
    table = struct.unpack_from("<Q", data, 16)[0]
    for place in (0, table + 1, len(data) + 24, 2**64 - 8):
        path.write_bytes(data[:16] + struct.pack("<Q", place) + data[24:])
        if place == 0:  # the number that a writer that was interrupted leaves there
            try:
                BetonIndex(path)
            except DataError:
                continue
            with pytest.raises(DataError):
                batches(BetonLoader(path, CROPS, batch_size=COUNT))
            continue
        with pytest.raises(DataError, match="table of items is broken"):
            BetonIndex(path)
    for size in (2**64 - 1, 2**63, len(data)):  # an item that is larger than the file
        items = np.frombuffer(data[table:], ffcv_file._ITEM).copy()
        items["size"][2] = size
        path.write_bytes(data[:table] + items.tobytes())
        assert BetonIndex(path).encoded([2])[0].size == 0 and BetonIndex(path).encoded([1])[0].size > 0


def test_beton_reader_survives_any_bytes(tmp_path):
    data = write(tmp_path / "x.beton").read_bytes()
    rng = np.random.default_rng(0)
    table = struct.unpack_from("<Q", data, 16)[0]
    metadata = ffcv_file._HEADER.itemsize + 2 * ffcv_file._FIELD.itemsize + COUNT * 24
    for trial in range(150):
        copy = bytearray(data)
        places = [*rng.integers(0, 42, 2), *rng.integers(24, metadata, 8), *rng.integers(table, len(data), 8)]
        for place in places[trial % 3 :]:
            copy[int(place)] = int(rng.integers(256))
        (tmp_path / "y.beton").write_bytes(copy if trial % 2 else copy[: int(rng.integers(len(copy)))])
        try:
            index = BetonIndex(tmp_path / "y.beton")
        except DataError:
            continue
        size = os.stat(tmp_path / "y.beton").st_size
        some = range(min(len(index), 50))
        for i, span in zip(some, index.encoded(some)):
            assert span.size == 0 or (span.offset >= 0 and 0 < span.size <= size - span.offset)
            with contextlib.suppress(DataError):
                read_picture(span, 3, index.path(i))


def test_ffcv_reads_our_files(tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption

    images = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(COUNT)]
    with BetonWriter(tmp_path / "x.beton", COUNT, LEAST_PAGE) as writer:
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
            raw = i % 2 == 0
            writer.add(image.tobytes() if raw else file.getvalue(), i, (16, 16), is_raw=raw)
    pipelines = {"image": [CenterCropRGBImageDecoder((16, 16), 1.0)], "label": [IntDecoder()]}
    for cached in (True, False):
        order = OrderOption.SEQUENTIAL
        options = {"batch_size": 1, "num_workers": 1, "order": order, "os_cache": cached, "pipelines": pipelines}
        loader = Loader(str(tmp_path / "x.beton"), **options)
        seen = 0
        for image, label in loader:
            difference = np.abs(images[seen].astype(int) - np.asarray(image[0]))
            assert int(label.reshape(-1)[0]) == seen
            assert difference.max() == 0 if seen % 2 == 0 else difference.mean() < 8
            seen += 1
        assert seen == COUNT


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_we_read_files_of_ffcv(tmp_path, mode):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from ffcv.fields import FloatField, IntField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Samples:
        def __len__(self):
            return COUNT

        def __getitem__(self, i):
            return float(i), pixels(int(i)), {"a": 1}, int(i)

    fields = {"score": FloatField(), "image": RGBImageField(write_mode=mode), "meta": JSONField(), "label": IntField()}
    DatasetWriter(str(tmp_path / "x.beton"), fields, num_workers=1).from_indexed_dataset(Samples())
    index = BetonIndex(tmp_path / "x.beton")
    assert index.labels.tolist() == list(range(COUNT))
    for i, span in enumerate(index.encoded(range(COUNT))):
        got = np.asarray(read_picture(span, 3, "x").planes[0])
        assert np.array_equal(got, pixels(i)) if mode == "raw" else got.shape == pixels(i).shape
