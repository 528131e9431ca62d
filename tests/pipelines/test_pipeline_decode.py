"""Decoding: channels, depths and formats come out right; damaged and hostile files end in a DataError naming them."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from bad_files import PILLOW_WARNS
from fastmim_pipelines.decode import read_picture
from fastmim_pipelines.native_decode import FileSpan
from fastmim_pipelines.spec import DataError, printable
from PIL import Image

pytestmark = PILLOW_WARNS
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
FORMATS = {
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff_lzw": ("TIFF", {"compression": "tiff_lzw"}),
}


def encoded(kind: str = "jpeg", image: Image.Image | None = None) -> bytes:
    name, options = FORMATS[kind]
    out = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(out, name, **options)
    return out.getvalue()


def write(tmp_path, data: bytes, name: str = "x.jpg") -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


@pytest.mark.parametrize("kind", FORMATS)
def test_decode_reads_the_format_whatever_the_name_says(tmp_path, kind):
    picture = read_picture(write(tmp_path, encoded(kind), "misnamed.png"), 3)
    got = picture.crop((0, 0, 60, 40), (40, 60))
    expected = np.asarray(Image.open(io.BytesIO(encoded(kind))).convert("RGB")).transpose(2, 0, 1)
    assert (picture.width, picture.height) == (60, 40)
    assert got.dtype == np.uint8 and np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("mode", "in_chans"),
    [(mode, chans) for mode in ("L", "RGB", "RGBA", "P", "1", "LA", "CMYK", "YCbCr") for chans in (1, 3, 4)],
)
def test_decode_converts_modes_to_channels(tmp_path, mode, in_chans):
    image = Image.fromarray(PIXELS).convert(mode)
    kind = "jpeg" if mode in ("CMYK", "YCbCr") else "png"
    crop = read_picture(write(tmp_path, encoded(kind, image)), in_chans).crop((0, 0, 60, 40), (40, 60))
    expected = np.asarray(Image.open(tmp_path / "x.jpg").convert({1: "L", 3: "RGB", 4: "RGBA"}[in_chans]))
    assert np.array_equal(crop, expected.reshape(40, 60, in_chans).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_fourth_channel_is_no_weight_of_the_others(tmp_path, kind):
    """As one image, Pillow would resize red by how opaque it is."""
    values = RNG.integers(0, 256, (40, 60, 4), dtype=np.uint8)
    values[:, 30:, 3] = 0
    np.save(tmp_path / "x.npy", values)
    picture = read_picture(write(tmp_path, encoded(kind, Image.fromarray(values))), 4)
    array = read_picture(str(tmp_path / "x.npy"), 4)
    for box, size in (((3, 5, 50, 30), (16, 16)), ((20.5, 0, 39, 40), (50, 60))):
        assert np.array_equal(picture.crop(box, size), array.crop(box, size))


def test_decode_says_which_tiff_files_pillow_does_not_read_whole(tmp_path):
    out = io.BytesIO()
    Image.frombytes("RGBX", (4, 4), RNG.integers(0, 256, 64, dtype=np.uint8).tobytes()).save(out, "TIFF")
    path, data = tmp_path / "x.tif", out.getvalue()
    path.write_bytes(data)
    with pytest.raises(DataError, match="Pillow drops the fourth band of this TIFF file; write a gray page per band"):
        read_picture(str(path), 4)
    assert read_picture(str(path), 3).crop((0, 0, 4, 4), (4, 4)).shape == (3, 4, 4)
    # Bands without a color, as geographic software writes them.
    rgb, plain = (struct.pack("<HHIHH", 262, 3, 1, photometric, 0) for photometric in (2, 1))
    assert data.count(rgb) == 1
    path.write_bytes(data.replace(rgb, plain))
    with pytest.raises(
        DataError, match=r"a TIFF file that Pillow does not read, .* write a gray page per band, or \.npy"
    ):
        read_picture(str(path), 4)


def test_decode_tells_arrays_with_the_channels_first(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 40, 60), np.uint8))
    with pytest.raises(
        DataError, match=r"expected 5 channels, got 60, the first axis having as many: arrays are \(H, W, C"
    ):
        read_picture(str(tmp_path / "x.npy"), 5)


def test_decode_takes_the_high_byte_of_16_bits(tmp_path):
    values = RNG.integers(0, 65536, (40, 60), dtype=np.uint16)
    for kind in ("png", "tiff"):
        crop = read_picture(write(tmp_path, encoded(kind, Image.fromarray(values))), 1).crop((0, 0, 60, 40), (40, 60))
        assert np.array_equal(crop[0], values >> 8)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 2), (np.uint8, 3), (np.uint16, 5)])
def test_decode_takes_the_pages_of_a_tiff_file_for_channels(tmp_path, dtype, channels):
    values = RNG.integers(0, np.iinfo(dtype).max + 1, (channels, 40, 60), dtype=dtype)
    pages = [Image.fromarray(page) for page in values]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    picture = read_picture(write(tmp_path, out.getvalue()), channels)
    assert np.array_equal(picture.crop((0, 0, 60, 40), (40, 60)), values >> (8 * (dtype().itemsize - 1)))
    # Another number of pages, or pages that are not channels: the first one alone, or nothing.
    first = read_picture(write(tmp_path, out.getvalue()), 1).crop((0, 0, 60, 40), (40, 60))
    assert np.array_equal(first[0], values[0] >> (8 * (dtype().itemsize - 1)))
    with pytest.raises(
        DataError, match=r"expected 9 channels, got an image file \(1, 3 or 4, or a TIFF file of 9 gray"
    ):
        read_picture(write(tmp_path, out.getvalue()), 9)
    out = io.BytesIO()
    pages = [Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    crop = read_picture(write(tmp_path, out.getvalue()), 3).crop((0, 0, 60, 40), (40, 60))
    assert np.array_equal(crop, np.asarray(pages[0]).transpose(2, 0, 1))


def test_decode_takes_the_high_byte_of_16_bit_arrays(tmp_path):
    values = RNG.integers(0, 65536, (40, 60, 6), dtype=np.uint16)
    np.save(tmp_path / "x.npy", values)
    for source in (str(tmp_path / "x.npy"), (tmp_path / "x.npy").read_bytes()):
        crop = read_picture(source, 6, "x.npy").crop((0, 0, 60, 40), (40, 60))
        assert np.array_equal(crop, (values >> 8).transpose(2, 0, 1))


def test_decode_does_not_wait_for_what_is_no_file(tmp_path):
    for name in ("x.jpg", "x.npy"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="not a regular file"):
            read_picture(str(tmp_path / name), 3)
        with pytest.raises(DataError, match="not a regular file"):
            read_picture(FileSpan(str(tmp_path / name), 0, 100), 3, name)


def test_decode_refuses_floats(tmp_path):
    path = write(tmp_path, encoded("tiff", Image.fromarray(np.ones((4, 4), np.float32))))
    with pytest.raises(DataError, match="expected 8 or 16 bits per channel, got Pillow mode F"):
        read_picture(path, 1)


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (3, 5, 17, 30), (2.5, 0.25, 33.3, 39.5), (59, 39, 1, 1)])
@pytest.mark.parametrize("size", [(40, 60), (16, 16), (7, 90)], ids=str)
def test_crop_is_pillows_antialiased_bicubic(tmp_path, box, size):
    crop = read_picture(write(tmp_path, encoded("png")), 3).crop(box, size)
    left, top, width, height = box
    expected = Image.fromarray(PIXELS).resize(
        size[::-1], Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    assert crop.shape == (3, *size) and np.array_equal(crop, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 1), (40, 60, 3), (40, 60, 7)], ids=str)
def test_decode_arrays_channel_by_channel(tmp_path, shape):
    values = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", values)
    channels = shape[2] if len(shape) == 3 else 1
    crop = read_picture(str(tmp_path / "x.npy"), channels).crop((4, 6, 30, 20), (10, 11))
    for c, plane in enumerate(values.reshape(40, 60, channels).transpose(2, 0, 1)):
        assert np.array_equal(
            crop[c], np.asarray(Image.fromarray(plane).resize((11, 10), Image.Resampling.BICUBIC, (4, 6, 34, 26)))
        )


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 5), np.uint8), "expected 3 channels, got 5"),
        (np.zeros((4, 4), np.uint8), "expected 3 channels, got 1"),
        (np.zeros((4, 4, 3), np.float32), r"expected a uint8 or uint16 array .*, got float32 \(4, 4, 3\)"),
        (np.zeros((4,), np.uint8), r"got uint8 \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \(0, 4, 3\)"),
        (np.array([{}]), "cannot be decoded"),
    ],
    ids=str,
)
def test_decode_refuses_other_arrays(tmp_path, array, reason):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=reason):
        read_picture(str(tmp_path / "x.npy"), 3)


def test_decode_refuses_hostile_arrays_from_the_header(tmp_path):
    for shape in ("(4000000000, 4000000000, 3)", "(1, 1, 99999999999)", "(-1, 4, 3)", "(4, 4, 3), 'x': 1"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
        path = write(tmp_path, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100), "x.npy")
        with pytest.raises(DataError, match=r"x\.npy"):
            read_picture(path, 3)
    np.savez(tmp_path / "y.npz", a=PIXELS)
    (tmp_path / "y.npz").rename(tmp_path / "y.npy")
    with pytest.raises(DataError, match=r"y\.npy"):
        read_picture(str(tmp_path / "y.npy"), 3)


def test_decode_of_image_files_knows_1_3_and_4_channels(tmp_path):
    with pytest.raises(DataError, match=r"expected 5 channels, got an image file .*; use \.npy"):
        read_picture(write(tmp_path, encoded()), 5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("percent", range(5, 100, 5))
def test_decode_detects_truncation(tmp_path, kind, percent):
    data = encoded(kind)
    path = write(tmp_path, data[: len(data) * percent // 100])
    with pytest.raises(DataError) as error:
        read_picture(path, 3)
    assert str(error.value).startswith(f"{path}: ") and error.value.path == path and error.value.reason


@pytest.mark.parametrize("kind", FORMATS)
def test_decode_survives_flipped_bits(tmp_path, kind):
    good, rng = encoded(kind), np.random.default_rng(1)
    for trial in range(40):
        data = bytearray(good)
        for place in rng.integers(0, 200 if trial % 2 else len(good), 3):
            data[place] ^= 1 << int(rng.integers(8))
        try:
            picture = read_picture(write(tmp_path, bytes(data)), 3)
        except DataError as e:
            assert "x.jpg" in str(e)
        else:
            assert picture.crop((0, 0, picture.width, picture.height), (8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>404 not found</html>", "not an image of a known format"),
        (b"GIF89a" + bytes(100), "not an image of a known format"),
        (b"\xff\xd8\xff" + bytes(100), "x.jpg"),
        (bytes(1000), "not an image of a known format"),
    ],
    ids=["empty", "html", "gif", "jpeg start", "zeros"],
)
def test_decode_names_what_is_no_image(tmp_path, data, reason):
    with pytest.raises(DataError, match=reason):
        read_picture(write(tmp_path, data), 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(65535, 65535), (10000, 10000)], ids=str)  # beyond Pillow's error; beyond its warning
def test_decode_refuses_decompression_bombs_from_the_header(tmp_path, size):
    with pytest.raises(DataError, match=f"more than {Image.MAX_IMAGE_PIXELS} pixels, refused"):
        read_picture(write(tmp_path, png_header(*size)), 3)
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": size})
        file.truncate(file.tell() + size[0] * size[1])  # sparse: takes no space
    with pytest.raises(DataError, match="pixels, refused"):
        read_picture(str(tmp_path / "x.npy"), 1)


def test_decode_names_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read \("):
            read_picture(str(path), 3)


def test_decode_retries_reading(tmp_path, monkeypatch):
    path, real_open, failures = write(tmp_path, encoded()), open, [OSError(5, "Input/output error")] * 2
    monkeypatch.setattr("fastmim_pipelines.decode._RETRY_SECONDS", 0)

    def flaky_open(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real_open(*args, **kwargs)

    monkeypatch.setattr("builtins.open", flaky_open)
    assert read_picture(path, 3).width == 60
    failures.extend([OSError(5, "Input/output error")] * 3)
    with pytest.raises(DataError, match="Input/output error"):
        read_picture(path, 3)


def test_decode_ignores_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(str(tmp_path / "x.jpg"), 3).width == 60


def test_data_error_crosses_processes_and_prints_as_one_line():
    error = pickle.loads(pickle.dumps(DataError("text", path="p", reason="r", exit_code=2)))
    assert (str(error), error.path, error.reason, error.exit_code) == ("text", "p", "r", 2)
    assert printable("/plain/名前.jpg") == "/plain/名前.jpg"
    assert printable("a\n\x1b[31mb\udcff").isprintable()
