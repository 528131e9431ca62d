"""Odd and broken image files, made here: what a crawl of the web, a full disk or an enemy leaves in a data set.

And what the tests that read them have in common.
"""

import gzip
import io
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from fastmim_pipelines import CropSpec, make_loader
from PIL import Image, ImageCms

GOOD, BAD, ANY = "good", "bad", "any"
SIZE = (56, 44)
CROPS = (CropSpec((24, 20)), CropSpec((9, 9), view=1))
BATCH = 20
SECONDS = 30  # the longest that reading them may take
# Pillow warns of much that is refused, or read in spite of it.
PILLOW_WARNS = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
MARKS = [pytest.mark.timeout(2 * SECONDS), *PILLOW_WARNS]


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


class Case(NamedTuple):
    name: str
    data: bytes
    verdict: str
    """GOOD must be read, BAD must be refused; ANY may be either, but the same for every loader of ours."""


def picture(seed: int = 0, size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """Soft colors with grain: no two rows are alike, so pixels from elsewhere show."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(soft, np.int16) + grain, 0, 255).astype(np.uint8)).convert(mode)


def encoded(kind: str = "JPEG", image: Image.Image | None = None, **options) -> bytes:
    out = io.BytesIO()
    (picture() if image is None else image).save(out, kind, **options)
    return out.getvalue()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def tiff_header(width: int, height: int, compression: int, data: bytes) -> bytes:
    """One strip of RGB pixels that the header says is width x height."""
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 2),
        (273, 4, 1, 8), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def with_frame(data: bytes, **changes: int) -> bytes:
    """A JPEG file with other values in the header of its frame."""
    at, changed = data.index(b"\xff\xc0"), bytearray(data)
    places = {"marker": (at + 1, 1), "precision": (at + 4, 1), "height": (at + 5, 2), "width": (at + 7, 2), "components": (at + 9, 1)}  # fmt: skip
    for name, value in changes.items():
        start, length = places[name]
        changed[start : start + length] = value.to_bytes(length, "big")
    return bytes(changed)


def without_segments(data: bytes, marker: int) -> bytes:
    while (at := data.find(bytes([0xFF, marker]))) >= 0:
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    return data


def bombs() -> dict[str, bytes]:
    """Small files that ask for gigabytes; the headers of the formats that are read, and kin."""
    small = encoded()
    return {
        "png-65k.png": png_header(65000, 65000),
        "png-2g.png": png_header((1 << 31) - 1, (1 << 31) - 1),
        "png-16-bit.png": png_header(60000, 60000, 16),
        "jpeg-65k.jpg": with_frame(small, width=65500, height=65500),
        "tiff.tif": tiff_header(65000, 65000, 1, bytes(1000)),
        "tiff-deflate.tif": tiff_header(65000, 65000, 8, zlib.compress(bytes(1 << 20))),
        "bmp.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 5000, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0) + bytes(900),
        "webp.webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<IBI", 9, 0x2F, 0x3FFF | 0x3FFF << 14) + bytes(5),
        "gif-million.jpg": b"GIF89a" + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0) + b"\x2c" * 5000,
        "fits-gzip.jpg": gzip.compress(b"SIMPLE  =                    T".ljust(80) + bytes(1 << 20)),
    }  # fmt: skip


def corpus(seed: int = 0) -> list[Case]:
    """All of them, in the order of their names."""
    cases = [*_truncated(), *_flipped(seed), *_other_content(), *_odd_jpegs(), *_odd_pictures()]
    cases += [Case(f"bomb-{name}", data, BAD) for name, data in bombs().items()]
    return [case._replace(name=f"{i:03d}-{case.name}") for i, case in enumerate(cases)]


def _truncated() -> Iterator[Case]:
    data = encoded(quality=92)
    for percent in range(5, 100, 5):
        yield Case(f"cut-{percent}.jpg", data[: len(data) * percent // 100], BAD)
    for kind, options, step in (
        ("JPEG", {"progressive": True}, 10), ("PNG", {}, 10), ("WEBP", {}, 20), ("BMP", {}, 20), ("TIFF", {}, 20),
    ):  # fmt: skip
        data = encoded(kind, **options)
        for percent in range(step, 100, step):
            yield Case(f"cut-{kind}-{percent}.{kind.lower()}", data[: len(data) * percent // 100], BAD)
    yield Case("cut-2-bytes.jpg", encoded()[:-2], BAD)
    yield Case("cut-in-the-end.jpg", encoded()[:-1], BAD)


def _flipped(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(kind)
        head = data.index(b"\xff\xda") if kind == "JPEG" else 60
        for part, (first, last) in {"header": (2, head), "body": (head, len(data))}.items():
            for i in range(4):
                changed = bytearray(data)
                for place in rng.integers(first, last, 1 + 2 * i):
                    changed[place] ^= 1 << int(rng.integers(8))
                yield Case(f"flip-{kind}-{part}-{i}.{kind.lower()}", bytes(changed), ANY)
    data = encoded()
    for name, start, length, byte in (("zeros", 0.5, 0.2, 0), ("ones", 0.5, 0.2, 255), ("all-after", 0.7, 1.0, 0)):
        first, last = int(len(data) * start), min(len(data), int(len(data) * (start + length)))
        yield Case(f"hole-{name}.jpg", data[:first] + bytes([byte]) * (last - first) + data[last:], ANY)


def _other_content() -> Iterator[Case]:
    rng = np.random.default_rng(1)
    archive, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.jpg", encoded())
    with tarfile.open(fileobj=tarred, mode="w") as file:
        member = tarfile.TarInfo("../../a.jpg")
        file.addfile(member)
    for name, data in {
        "empty": b"", "one-byte": b"\xff", "only-start": b"\xff\xd8", "start-and-end": b"\xff\xd8\xff\xd9",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "pdf": b"%PDF-1.7\n" + rng.bytes(300),
        "zip": archive.getvalue(), "tar": tarred.getvalue(), "mp4": b"\0\0\0\x20ftypisom" + rng.bytes(500),
        "noise": rng.bytes(3000), "zeros": bytes(3000), "ones": b"\xff" * 3000, "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "gif": encoded("GIF"), "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file", "pickle": b"\x80\x04cposix\nsystem\n.",
    }.items():  # fmt: skip
        yield Case(f"{name}.jpg", data, BAD)


def _odd_jpegs() -> Iterator[Case]:
    data = encoded(quality=92)
    yield Case("no-tables.jpg", without_segments(data, 0xDB), BAD)
    yield Case("no-codes.jpg", without_segments(data, 0xC4), ANY)  # libjpeg has codes for that
    yield Case("no-frame.jpg", without_segments(data, 0xC0), BAD)
    yield Case("arithmetic.jpg", with_frame(data, marker=0xC9), ANY)  # read as another coding: garbage, or refused
    yield Case("lossless.jpg", with_frame(data, marker=0xC3), BAD)
    yield Case("12-bit.jpg", with_frame(data, marker=0xC1, precision=12), BAD)
    yield Case("no-width.jpg", with_frame(data, width=0), BAD)
    yield Case("no-height.jpg", with_frame(data, height=0), BAD)
    yield Case("too-high.jpg", with_frame(data, height=5000), ANY)  # the rest is gray
    for components in (0, 2, 4, 200):
        yield Case(f"{components}-components.jpg", with_frame(data, components=components), BAD)
    yield Case("junk-behind.jpg", data + bytes(700), GOOD)
    yield Case("two-in-one.jpg", data + encoded(image=picture(1)), GOOD)
    yield Case("long-comment.jpg", data[:2] + segment(0xFE, bytes(65000)) + data[2:], GOOD)
    yield Case(
        "hostile-exif.jpg", data[:2] + segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(60)) + data[2:], ANY
    )
    yield Case("cmyk.jpg", encoded(image=picture(mode="CMYK")), GOOD)
    inks = encoded(image=picture(mode="CMYK"))
    yield Case("ycck.jpg", inks.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2", 1), GOOD)
    yield Case("gray.jpg", encoded(image=picture(mode="L")), GOOD)
    yield Case("progressive.jpg", encoded(progressive=True), GOOD)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Case("profile.jpg", encoded(icc_profile=profile), GOOD)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield Case(f"turned-{turn}.jpg", encoded(exif=exif), GOOD)
    for width, height in ((1, 1), (1, 65000), (65000, 1), (3, 2000)):
        yield Case(f"{width}x{height}.jpg", encoded(image=Image.new("RGB", (width, height), (9, 200, 70))), GOOD)


def _odd_pictures() -> Iterator[Case]:
    for mode, kind in (
        ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "TIFF"), ("P", "BMP"),
    ):  # fmt: skip
        yield Case(f"{mode}.{kind.lower()}", encoded(kind, picture(mode=mode)), GOOD)
    deep = Image.fromarray((np.asarray(picture(mode="L"), np.uint16) << 8) | 77)
    yield Case("16-bit.png", encoded("PNG", deep), GOOD)
    yield Case("16-bit.tif", encoded("TIFF", deep), GOOD)
    yield Case("float.tif", encoded("TIFF", Image.new("F", SIZE, 0.5)), BAD)
    transparent = picture(mode="P")
    transparent.info["transparency"] = bytes(range(256))
    yield Case("palette-with-alpha.png", encoded("PNG", transparent), GOOD)
    frames = [picture(i) for i in range(3)]
    yield Case("animated.png", encoded("PNG", frames[0], save_all=True, append_images=frames[1:]), GOOD)
    yield Case("animated.webp", encoded("WEBP", frames[0], save_all=True, append_images=frames[1:]), GOOD)
    yield Case("pages.tif", encoded("TIFF", frames[0], save_all=True, append_images=frames[1:]), GOOD)
    yield Case("png-called.jpg", encoded("PNG"), GOOD)
    yield Case("jpg-called.png", encoded(), GOOD)
    yield Case("webp-called.jpg", encoded("WEBP"), GOOD)
    yield Case("bmp-called.tif", encoded("BMP"), GOOD)
