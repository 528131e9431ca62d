"""The native decoder: Pillow's pixels bit for bit, Pillow's verdict on every file, and no crash on any bytes."""

import io
import os
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastmim_pipelines import native_decode
from fastmim_pipelines.decode import CropReader, read_picture
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.folder import FolderLoader
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.native_decode import FILTERS, FileSpan
from fastmim_pipelines.spec import CropSpec, DataError
from fastmim_pipelines.workers import ThreadAnswers
from PIL import Image

DECODER, WHY_NOT = native_decode.load()
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
needs_native = pytest.mark.skipif(DECODER is None, reason=WHY_NOT)
DONE, UNREADABLE, OTHER_KIND, TOO_LARGE, DAMAGED = range(5)


@pytest.fixture(autouse=True)
def unforced(monkeypatch):
    monkeypatch.delenv("FASTMIM_DECODE", raising=False)


def picture(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft blobs with some grain: has all frequencies, and is not too large as a file."""
    small = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(soft + rng.integers(-20, 21, soft.shape), 0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_segments(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


def by_pillow(data, box, size, filter="bicubic", in_chans=3) -> np.ndarray:
    return read_picture(data, in_chans).crop(box, size, filter)


def natively(images, boxes, size, filter="bicubic", in_chans=3, threads=1):
    """Pixels and status."""
    out = np.full((len(images), in_chans, *size), 77, np.uint8)
    with DECODER.open(images, threads) as batch:
        batch.crop(np.array([boxes], np.float64).reshape(1, len(images), 4), [filter], [out])
        return out, batch.status.tolist()


def random_box(rng, width, height, is_whole: bool):
    w, h = rng.uniform(1, width + 0.01), rng.uniform(1, height + 0.01)
    w, h = min(w, width), min(h, height)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return tuple(map(int, (left, top, w, h))) if is_whole else (left, top, w, h)


# -- the same pixels ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def instructions(request):
    """Each version of the resampler that this processor can run."""
    DECODER._library.fastmim_decode_use_instructions(request.param)
    yield
    DECODER._library.fastmim_decode_use_instructions(2)


@needs_native
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"subsampling": 2, "restart_marker_blocks": 3}),
        ("RGB", {"subsampling": 2, "progressive": True}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
    ids=str,
)
def test_native_pixels_are_pillows(mode, options, filter, instructions):
    rng = np.random.default_rng(len(str(options)))
    for trial in range(6):
        width, height = int(rng.integers(1, 200)), int(rng.integers(1, 200))
        data = jpeg(picture(rng, width, height, mode), quality=int(rng.integers(40, 97)), **options)
        for in_chans in (1, 3):
            box = random_box(rng, width, height, is_whole=trial % 2 == 0)
            size = (int(rng.integers(1, 120)), int(rng.integers(1, 120)))
            out, status = natively([data], [box], size, filter, in_chans)
            assert status == [DONE]
            assert np.array_equal(out[0], by_pillow(data, box, size, filter, in_chans)), (width, height, box, size)


@needs_native
@pytest.mark.parametrize("place", [(0, 0), (1, 1), (0.5, 0.5), (1, 0)], ids=str)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_native_region_at_any_place_equals_the_whole_decode(subsampling, place):
    """Without resizing, so that every pixel of the region is seen, along all its borders."""
    rng = np.random.default_rng(subsampling)
    data = jpeg(picture(rng, 131, 117), subsampling=subsampling, quality=80)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    for width, height in ((1, 1), (16, 16), (17, 33), (50, 40), (131, 117)):
        left, top = int(place[0] * (131 - width)), int(place[1] * (117 - height))
        out, _ = natively([data], [(left, top, width, height)], (height, width))
        assert np.array_equal(out[0], whole[:, top : top + height, left : left + width])


@needs_native
def test_native_reads_unusual_sampling_and_color(tmp_path):
    rng = np.random.default_rng(3)
    data = jpeg(picture(rng, 90, 70), subsampling=0, quality=90)
    frame = data.index(b"\xff\xc0") + 10
    for luma, chroma in ((0x12, 0x11), (0x41, 0x11), (0x22, 0x21), (0x11, 0x22)):
        # Other factors in the header than the data were made with: damaged, or another picture, but the same to both.
        changed = bytearray(data)
        changed[frame + 1], changed[frame + 4] = luma, chroma
        reader = CropReader([((20, 30), "bicubic")], 3)
        outs = [np.zeros((1, 3, 20, 30), np.uint8) for _ in range(2)]
        (first,) = reader.read([bytes(changed)], ["x"], lambda i, w, h: [(0, 0, w, h)], [outs[0]])
        reader.uses_native = False
        (second,) = reader.read([bytes(changed)], ["x"], lambda i, w, h: [(0, 0, w, h)], [outs[1]])
        assert str(first) == str(second) and np.array_equal(*outs)
    for transform in (0, 1):  # RGB stored as such, and as YCbCr
        marked = with_segments(data, segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])))
        out, status = natively([marked], [(5, 6, 70, 50)], (33, 44))
        assert status == [DONE] and np.array_equal(out[0], by_pillow(marked, (5, 6, 70, 50), (33, 44)))


@needs_native
def test_native_cuts_several_crops_from_one_decode_in_any_number_of_threads(tmp_path):
    rng = np.random.default_rng(0)
    datas = [jpeg(picture(rng, int(w), int(h))) for w, h in rng.integers(20, 120, (13, 2))]
    (tmp_path / "all").write_bytes(b"".join(datas))
    for i, data in enumerate(datas):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    offsets = np.cumsum([0, *map(len, datas)]).tolist()
    boxes = rng.uniform(1, 15, (3, 13, 4))
    sizes, filters = ((24, 31), (7, 90), (64, 64)), ("bicubic", "bilinear", "lanczos")
    with open(tmp_path / "all", "rb") as file:
        kinds = {
            "bytes": datas,
            "views": [memoryview(data) for data in datas],
            "arrays": [np.frombuffer(data, np.uint8) for data in datas],
            "mixed": [data if i % 3 else str(tmp_path / f"{i}.jpg") for i, data in enumerate(datas)],
            "paths": [str(tmp_path / f"{i}.jpg") for i in range(13)],
            "spans": [
                FileSpan(str(tmp_path / "all"), offsets[i], len(data), file.fileno() if i % 2 else -1)
                for i, data in enumerate(datas)
            ],
        }
        for name, images in kinds.items():
            for threads in (1, 3, 50):
                outs = [np.zeros((13, 3, *size), np.uint8) for size in sizes]
                expected = [OTHER_KIND if name == "mixed" and i % 3 == 0 else DONE for i in range(13)]
                with DECODER.open(images, threads) as batch:
                    assert batch.status.tolist() == expected
                    batch.crop(boxes, filters, outs)
                    assert batch.status.tolist() == expected
                for k in range(3):
                    for i in np.flatnonzero(np.array(expected) == DONE).tolist():
                        data = datas[i]
                        assert np.array_equal(outs[k][i], by_pillow(data, boxes[k, i], sizes[k], filters[k]))


@needs_native
def test_native_clamps_boxes_as_the_pillow_path_does():
    rng = np.random.default_rng(1)
    data = jpeg(picture(rng, 40, 30))
    for box in (
        (-5, -5, 20, 20), (30, 20, 100, 100), (0, 0, 1e9, 1e9), (100, 100, 5, 5), (10, 10, 0, 0), (3, 3, -7, 1), (39.9999999, 0, 1, 1),
    ):  # fmt: skip
        out, status = natively([data], [box], (9, 11))
        assert status == [DONE] and np.array_equal(out[0], by_pillow(data, box, (9, 11))), box


@needs_native
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (8, 8), (17, 1)], ids=str)
def test_native_reads_pictures_of_any_shape(size):
    data = jpeg(picture(np.random.default_rng(2), *size))
    for box in ((0, 0, *size), (size[0] - 1, size[1] - 1, 1, 1)):
        for out_size in ((1, 1), (5, 70)):
            out, status = natively([data], [box], out_size)
            assert status == [DONE] and np.array_equal(out[0], by_pillow(data, box, out_size))


# -- the same verdict --------------------------------------------------------------------------------------------------


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """The file with one kind of damage."""
    changed, kind = bytearray(data), rng.integers(8)
    scan = data.index(b"\xff\xda") + 14
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[: -int(rng.integers(1, 12))]
    if kind in (2, 3):  # bits of the header; of the rest
        for place in rng.integers(*((0, scan) if kind == 2 else (scan, len(data))), 3):
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 4:
        changed[start : start + length] = rng.bytes(length)
    elif kind == 5:
        del changed[start : start + length]
    elif kind == 6:  # a marker, with or without a body
        place = int(rng.integers(scan, len(data)))
        changed[place:place] = bytes([0xFF, int(rng.integers(0xC0, 0x100))]) + rng.bytes(int(rng.integers(10)))
    else:
        changed[int(rng.integers(scan))] = int(rng.choice([0, 1, 8, 0xC0, 0xD9, 0xDA, 0xFF]))
    return bytes(changed)


def decorated(rng: np.random.Generator) -> bytes:
    """A small file with the metadata that real ones have."""
    mode = str(rng.choice(["RGB", "RGB", "RGB", "L", "CMYK"]))
    options = {"quality": int(rng.integers(40, 95)), "progressive": bool(rng.integers(4) == 0)}
    if mode == "RGB":
        options["subsampling"] = int(rng.integers(3))
    if rng.integers(3) == 0:
        options["restart_marker_blocks"] = int(rng.integers(1, 6))
    if rng.integers(2):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F], exif[0x8769] = 6, "Maker", {0x9000: b"0230"}
        options["exif"] = exif
    if rng.integers(3) == 0:
        options["icc_profile"] = rng.bytes(200)
    data = jpeg(picture(rng, *map(int, rng.integers(1, 70, 2)), mode), **options)
    if rng.integers(3) == 0:
        resource = b"8BIM\x03\xed\0\0\0\0\0\x10" + struct.pack(">IHHIHH", 72 << 16, 1, 1, 72 << 16, 1, 1)
        data = with_segments(data, segment(0xED, b"Photoshop 3.0\0" + resource + b"8BIM\x04\x04\0\0\0\0\0\x02ab"))
    return data


@needs_native
@pytest.mark.parametrize("seed", range(4))
def test_native_takes_no_damaged_file_that_pillow_refuses(seed):
    rng = np.random.default_rng(seed)
    taken = refused = 0
    for trial in range(600):
        if trial % 10 == 0:
            base = decorated(rng)
        data, boxes = mutated(rng, base), []

        def boxes_of(i, width, height, boxes=boxes):
            # Often at the top: most of the damage then lies where the native decoder never looks.
            return boxes or boxes.append((0, 0, width, max(1, height // 4))) or boxes

        with DECODER.open([data]) as batch:
            out = np.empty((1, 3, 9, 8), np.uint8)
            if batch.status[0] == DONE:
                boxes_of(0, int(batch.widths[0]), int(batch.heights[0]))
                batch.crop(np.array([boxes]), ["bicubic"], [out])
            if batch.status[0] != DONE:
                refused += 1
                continue
        taken += 1
        assert np.array_equal(out[0], by_pillow(data, boxes[0], (9, 8)))  # which raises for what it refuses
    assert taken > 50 and refused > 100


@needs_native
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_native_refuses_truncation_below_the_crop(options):
    data = jpeg(picture(np.random.default_rng(5), 120, 160), **options)
    for end in [*(len(data) * percent // 100 for percent in range(5, 100, 5)), -3, -2]:
        cut = data[:end]
        out, status = natively([cut], [(0, 0, 120, 8)], (8, 8))
        assert status != [DONE] and (out == 77).all()
        with pytest.raises(DataError):
            read_picture(cut, 3)


@needs_native
def test_native_leaves_other_files_to_pillow(tmp_path):
    image = picture(np.random.default_rng(6), 50, 40)
    datas = {"empty": b"", "html": b"<html>", "start": b"\xff\xd8\xff", "noise": np.random.default_rng(0).bytes(5000)}
    for name in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        out = io.BytesIO()
        image.save(out, name)
        datas[name] = out.getvalue()
    datas["cmyk"] = jpeg(image.convert("CMYK"))
    plain = jpeg(image)
    twelve_bits = bytearray(plain)
    twelve_bits[plain.index(b"\xff\xc0") + 4] = 12
    datas |= {
        "12 bits": bytes(twelve_bits),
        "arithmetic coding": plain.replace(b"\xff\xc0", b"\xff\xc9", 1),
        "lossless": plain.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "two pictures": with_segments(plain, segment(0xE2, b"MPF\0II*\0")),
        "short JFIF": plain[:2] + segment(0xE0, b"JFIF\0") + plain[2:],
        "odd Photoshop": with_segments(plain, segment(0xED, b"Photoshop 3.0\x008BIM\0\0")),
        "no tables": plain[: plain.index(b"\xff\xc4")] + plain[plain.index(b"\xff\xda") :],
    }
    reader = CropReader([((12, 13), "bicubic")], 3)
    assert reader.uses_native
    alone = CropReader([((12, 13), "bicubic")], 3)
    alone.uses_native = False
    for name, data in datas.items():
        out, status = natively([data], [(0, 0, 10, 10)], (12, 13))
        # Some builds of libjpeg have standard tables for a file without.
        assert name == "no tables" or (status[0] in (OTHER_KIND, DAMAGED) and (out == 77).all()), name
        (tmp_path / "x.jpg").write_bytes(data)
        results = []
        for each in (reader, alone):
            pixels = np.zeros((1, 3, 12, 13), np.uint8)
            (error,) = each.read([str(tmp_path / "x.jpg")], ["named"], lambda i, w, h: [(1, 2, 30, 20)], [pixels])
            results.append((str(error), pixels.tobytes()))
        assert results[0] == results[1], name
        assert results[0][0] == "None" or results[0][0].startswith("named: ")


@needs_native
def test_native_reads_only_whole_regular_files(tmp_path):
    data = jpeg(picture(np.random.default_rng(7), 30, 30))
    (tmp_path / "good.jpg").write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    names = ["good.jpg", "pipe.jpg", "gone.jpg", "."]
    with DECODER.open([str(tmp_path / name) for name in names], 2) as batch:
        assert batch.status.tolist() == [DONE, UNREADABLE, UNREADABLE, UNREADABLE]
    with open(tmp_path / "good.jpg", "rb") as file:
        places = [(0, len(data)), (0, len(data) + 1), (-1, 5), (1 << 40, 100), (0, 0), (0, -3)]
        for descriptor in (file.fileno(), -1):
            spans = [FileSpan(str(tmp_path / "good.jpg"), *place, descriptor) for place in places]
            with DECODER.open(spans) as batch:
                assert batch.status.tolist() == [DONE] + [UNREADABLE] * 5
            for span in spans[1:]:
                with pytest.raises(DataError, match=r"^named: "):
                    read_picture(span, 3, "named")
    with DECODER.open([FileSpan("", 0, 10, 1 << 20)]) as batch:
        assert batch.status.tolist() == [UNREADABLE]


@needs_native
@pytest.mark.parametrize("in_chans", [1, 3])
def test_native_resizes_raw_pixels(tmp_path, in_chans):
    rng = np.random.default_rng(11)
    images = [rng.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8) for h, w in rng.integers(1, 90, (10, 2))]
    (tmp_path / "raw").write_bytes(b"".join(image.tobytes() for image in images))
    offsets = np.cumsum([0, *(image.size for image in images)]).tolist()
    spans = [
        FileSpan(str(tmp_path / "raw"), offsets[i], image.size, -1, image.shape[1], image.shape[0])
        for i, image in enumerate(images)
    ]
    boxes = [(1, 2, 30, 20)] * 10
    out, status = natively(spans, boxes, (17, 21), in_chans=in_chans)
    assert status == [DONE] * 10
    for pixels, span, image in zip(out, spans, images):
        assert np.array_equal(pixels, by_pillow(span, boxes[0], (17, 21), in_chans=in_chans))
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        assert np.array_equal(pixels, by_pillow(png.getvalue(), boxes[0], (17, 21), in_chans=in_chans))
    for bad in (
        spans[-1]._replace(height=1 + spans[-1].height),
        spans[-1]._replace(height=-5),
        spans[-1]._replace(offset=offsets[-2] + 9),
    ):
        assert natively([bad], boxes[:1], (4, 4))[1] != [DONE]
        with pytest.raises(DataError):
            read_picture(bad, 3)


@needs_native
def test_native_refuses_giant_headers_and_keeps_pillows_limit(monkeypatch):
    data = bytearray(jpeg(picture(np.random.default_rng(8), 32, 32), progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    assert natively([bytes(data)], [(0, 0, 9, 9)], (4, 4))[1] == [TOO_LARGE]
    with pytest.raises(DataError, match="pixels, refused"):
        read_picture(bytes(data), 3)
    good = jpeg(picture(np.random.default_rng(8), 32, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 - 1)
    assert natively([good], [(0, 0, 9, 9)], (4, 4))[1] == [TOO_LARGE]
    with pytest.raises(DataError, match="more than 1023 pixels, refused"):
        read_picture(good, 3)
    for limit in (32 * 32, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert natively([good], [(0, 0, 9, 9)], (4, 4))[1] == [DONE]


@needs_native
def test_native_checks_what_it_is_asked_to_fill():
    data = jpeg(picture(np.random.default_rng(9), 20, 20))
    boxes, good = np.zeros((1, 1, 4)), np.zeros((1, 3, 4, 4), np.uint8)
    with DECODER.open([data]) as batch:
        for out, filters, wrong in (
            ([np.zeros((1, 3, 4, 8), np.uint8)[..., ::2]], ["bicubic"], boxes),
            ([np.zeros((2, 3, 4, 4), np.uint8)], ["bicubic"], boxes),
            ([np.zeros((1, 3, 4, 4), np.int8)], ["bicubic"], boxes),
            ([np.zeros((1, 4, 4, 4), np.uint8)], ["bicubic"], boxes),
            ([good], ["bicubic"], np.zeros((2, 1, 4))),
            ([good], ["nearest"], boxes),
        ):
            with pytest.raises(ValueError):
                batch.crop(wrong, filters, out)
    with DECODER.open([]) as batch:
        batch.crop(np.zeros((1, 0, 4)), ["bicubic"], [np.zeros((0, 3, 4, 4), np.uint8)])


# -- which decoder runs ------------------------------------------------------------------------------------------------


def test_choose_obeys_the_variable_and_gives_reasons(monkeypatch):
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    assert native_decode.choose() == (None, "Pillow decodes: FASTMIM_DECODE=pillow")
    monkeypatch.setenv("FASTMIM_DECODE", "turbo")
    with pytest.raises(ValueError, match="FASTMIM_DECODE: expected pillow or native, got 'turbo'"):
        native_decode.choose()
    monkeypatch.setattr(native_decode, "load", lambda: (None, "the native decoder is not built; do so"))
    monkeypatch.setenv("FASTMIM_DECODE", "native")
    with pytest.raises(ValueError, match="expected the native decoder, but the native decoder is not built; do so"):
        native_decode.choose()
    monkeypatch.delenv("FASTMIM_DECODE")
    assert native_decode.choose() == (None, "Pillow decodes: the native decoder is not built; do so")
    assert not CropReader([((4, 4), "bicubic")], 3).uses_native


@needs_native
def test_load_tells_what_is_wrong(monkeypatch, tmp_path):
    def reload():
        return native_decode.load.__wrapped__()

    assert reload()[0] is not None
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_libjpegs", lambda: [])
        assert reload() == (None, "no shared libjpeg was found that Pillow uses")
        patch.setattr(native_decode, "_libjpegs", lambda: ["libm.so.6"])
        assert "libm.so.6 cannot be used (it lacks functions of libjpeg-turbo" in reload()[1]
        patch.setattr(native_decode, "_libjpegs", lambda: ["/nonexistent.so"])
        assert "/nonexistent.so cannot be used" in reload()[1]
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_VERSION", -1)
        assert "was built from other sources; build it with" in reload()[1]
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_equals_pillow", lambda decoder: False)
        assert "its pixels differ from those of Pillow" in reload()[1]
    assert native_decode._equals_pillow(DECODER), "a decoder in use changed when another was tried"
    (tmp_path / "_decode.so").write_bytes(b"not a library")
    monkeypatch.setattr("fastmim_pipelines.__path__", [str(tmp_path)])
    assert "cannot be loaded" in reload()[1]
    (tmp_path / "_decode.so").unlink()
    assert "is not built; build it with `python -m fastmim_pipelines.native_decode build`" in reload()[1]


def test_build_needs_sources_and_a_compiler(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "_SOURCES", tmp_path)
        with pytest.raises(RuntimeError, match=r"expected sources in .*, got none"):
            native_decode.build()
    if not native_decode._SOURCES.is_dir():
        pytest.skip("no sources here: installed from a wheel")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="expected a C\\+\\+ compiler, got none"):
        native_decode.build()


def test_libjpeg_interface_is_that_of_the_header(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not native_decode._SOURCES.is_dir():
        pytest.skip("needs a compiler and the sources")
    fields = (
        "src image_width num_components out_color_space scale_denom output_gamma dct_method colormap output_scanline"
    )
    (tmp_path / "check.cpp").write_text(
        f'#include <cstdio>\n#include "{native_decode._SOURCES}/libjpeg_abi.h"\n'
        "#if !__has_include(<jpeglib.h>)\n#error no header\n#endif\n#include <jpeglib.h>\n"
        + "".join(
            f"static_assert(offsetof(jpeg::Decompress, {f}) == offsetof(jpeg_decompress_struct, {f}), {f!r});\n".replace("'", '"')
            for f in fields.split()
        )
        + "static_assert(sizeof(jpeg::Decompress) == sizeof(jpeg_decompress_struct), \"size\");\n"
        "static_assert(sizeof(jpeg::ErrorManager) == sizeof(jpeg_error_mgr), \"error manager\");\n"
        "static_assert(sizeof(jpeg::SourceManager) == sizeof(jpeg_source_mgr), \"source manager\");\n"
        "static_assert(jpeg::kGrayscale == JCS_GRAYSCALE && jpeg::kRgb == JCS_RGB, \"color spaces\");\n"
        "static_assert(jpeg::kLibVersion == JPEG_LIB_VERSION, \"version\");\n"
    )  # fmt: skip
    result = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", tmp_path / "check.cpp"], capture_output=True, text=True
    )
    if "no header" in result.stderr or "version" in result.stderr:
        pytest.skip("no jpeglib.h of version 6.2 here")
    assert result.returncode == 0, result.stderr


# -- in the loaders ----------------------------------------------------------------------------------------------------

CROPS = (CropSpec((32, 32)), CropSpec((24, 20), scale=(0.05, 0.4), view=1, filter="lanczos"))


@pytest.fixture
def loader_of(request):
    def build(folder, **options) -> FolderLoader:
        loader = FolderLoader(folder, CROPS, **{"batch_size": 8, **options})
        request.addfinalizer(loader.close)
        return loader

    return build


def batches(loader, epoch=0, start=0) -> list:
    return [
        (batch.ids.tolist(), *(crop.numpy().tobytes() for crop in batch.crops)) for batch in loader.epoch(epoch, start)
    ]


@pytest.fixture
def mixed(demo_set, tmp_path) -> Path:
    """The training pictures, some as PNG, CMYK or gray JPEG."""
    folder = tmp_path / "mixed"
    shutil.copytree(demo_set / "train", folder)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        if i % 4 == 0:
            image = Image.open(path)
            if i % 12 == 0:
                image.save(path, "PNG")
            else:
                image.convert("CMYK" if i % 12 == 4 else "L").save(path, "JPEG")
    return folder


@pytest.mark.parametrize("in_chans", [1, 3])
def test_loader_gives_the_same_batches_by_any_decoder(mixed, loader_of, monkeypatch, in_chans):
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    expected = batches(loader_of(mixed, in_chans=in_chans))
    monkeypatch.delenv("FASTMIM_DECODE")
    for options in ({"workers": 0}, {"workers": 0, "threads": 1}, {"workers": 0, "threads": 5}, {"workers": None}):
        loader = loader_of(mixed, in_chans=in_chans, **options)
        assert batches(loader) == expected, options
        assert batches(loader, 0, 5) == expected[5:]
        assert len(batches(loader, 1)) == 7


def test_loader_decodes_in_threads_by_default_where_that_is_native(demo_set, loader_of, monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.workers.default_workers", lambda world, trains_on_cpu: 3)
    loader = loader_of(demo_set / "train", workers=None)
    if DECODER is not None:
        assert (loader.workers, loader.threads) == (0, 3) and loader.reason.startswith("native decoder with libjpeg")
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    loader = loader_of(demo_set / "train", workers=None)
    assert (loader.workers, loader.threads) == (3, 1) and loader.reason == "Pillow decodes: FASTMIM_DECODE=pillow"
    assert [loader_of(demo_set / "train", workers=w, threads=t).threads for w, t in ((0, None), (2, None), (1, 4), (0, 2))] == [
        0, 1, 4, 2,
    ]  # fmt: skip
    monkeypatch.delenv("FASTMIM_DECODE")
    assert "Pillow decodes: " in FolderLoader(demo_set / "train", CROPS, batch_size=8, in_chans=4).reason


def test_loader_threads_end_with_the_loader(demo_set, loader_of):
    before = set(threading.enumerate())
    loader = loader_of(demo_set / "train", workers=0, threads=3)
    running = loader.epoch(0)
    next(running)
    assert len(set(threading.enumerate()) - before) == 3
    loader.close()
    loader.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="use the newest iterator only"):
        next(running)


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"workers": 0, "threads": 3}, {"workers": 2, "threads": 2}], ids=str
)
def test_loader_carries_errors_and_substitutes_alike_in_threads(mixed, loader_of, monkeypatch, options):
    index = FolderIndex(mixed)
    for sample_id, data in ((4, b""), (21, Path(index.path(21)).read_bytes()[:-400]), (50, b"<html>")):
        Path(index.path(sample_id)).write_bytes(data)
    spoiled = {index.path(i) for i in (4, 21, 50)}
    with pytest.raises(DataError, match="--on-bad-image skip") as error:
        batches(loader_of(mixed, **options))
    assert error.value.path in spoiled and "(sample " in str(error.value)
    loader = loader_of(mixed, on_bad_image="skip", **options)
    got = batches(loader)
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    plain = loader_of(mixed, on_bad_image="skip")
    assert got == batches(plain)
    assert loader.bad_images == plain.bad_images and {path for path, _ in loader.bad_images} <= spoiled


def test_loader_notices_files_that_vanish_during_a_run(mixed, loader_of):
    loader = loader_of(mixed, workers=0, threads=2)
    running = loader.epoch(0)
    next(running)
    shutil.rmtree(mixed)
    with pytest.raises(DataError, match="cannot be read"):
        for epoch in range(1, 4):
            list(running)
            running = loader.epoch(epoch)


@needs_native
def test_processes_may_fork_while_threads_decode(demo_set, loader_of):
    ahead = loader_of(demo_set / "train", workers=0, threads=2)
    running = ahead.epoch(0)
    next(running)
    expected = batches(loader_of(demo_set / "train"))
    for _ in range(3):
        assert batches(loader_of(demo_set / "train", workers=2)) == expected
        next(running)


@pytest.mark.parametrize("options", [{"workers": 2}, {"threads": 3}, {"workers": None}], ids=str)
def test_evaluation_reads_the_same_by_any_decoder(mixed, monkeypatch, options):
    Path(FolderIndex(mixed).path(7)).write_bytes(b"")

    def read(**options):
        reader = EvalReader(mixed, (28, 30), batch_size=7, on_bad_image="skip", **options)
        return [(b.images.numpy().tobytes(), b.labels.tolist(), b.ids.tolist()) for b in reader], reader.bad_images

    got = read(**options)
    monkeypatch.setenv("FASTMIM_DECODE", "pillow")
    assert got == read() and len(got[1]) == 1


class Slow(torch.utils.data.Dataset):
    def __getitem__(self, seconds: float) -> float:
        if seconds < 0:
            raise DataError("bad", path="p")
        time.sleep(seconds)
        return seconds


def test_thread_answers_come_in_order_with_errors_at_their_place():
    answers = ThreadAnswers(Slow(), [0.05, 0, 0.02, -1, 0.01], threads=3)
    assert [next(answers) for _ in range(3)] == [0.05, 0, 0.02]
    with pytest.raises(DataError, match="bad"):
        next(answers)
    assert next(answers) == 0.01
    with pytest.raises(StopIteration):
        next(answers)
    answers.close()
    answers.close()


def test_thread_answers_do_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("fastmim_pipelines.workers._PATIENCE_S", 0.05)
    answers = ThreadAnswers(Slow(), [0.4] * 5, threads=1, timeout_s=0.05)
    with pytest.raises(RuntimeError, match=r"data threads: expected an answer within 0.05 s, got none; look whether"):
        next(answers)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 0.3


def test_thread_answers_prepare_each_thread():
    prepared = []
    answers = ThreadAnswers(Slow(), [0.01] * 4, threads=2, prepare=lambda: prepared.append(threading.current_thread()))
    assert list(answers) == [0.01] * 4 and len(set(prepared)) == 2
    answers.close()
