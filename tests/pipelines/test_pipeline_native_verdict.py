"""The native decoder gives Pillow's verdict on every file, and does not crash on any bytes."""

import io
import os
import struct

import numpy as np
import pytest
from bad_files import PILLOW_WARNS
from fastmim_pipelines.decode import CropReader, read_picture
from fastmim_pipelines.native_decode import FileSpan
from fastmim_pipelines.spec import DataError
from native_decoding import (
    DAMAGED,
    DECODER,
    DONE,
    OTHER_KIND,
    TOO_LARGE,
    UNREADABLE,
    by_pillow,
    jpeg,
    natively,
    needs_native,
    picture,
    segment,
    with_segments,
)
from PIL import Image

pytestmark = [pytest.mark.usefixtures("unforced"), *PILLOW_WARNS]


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
