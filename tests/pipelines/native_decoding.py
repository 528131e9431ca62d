"""Pictures, JPEG files and both decoders, for the tests of the native one."""

import io
import struct

import numpy as np
import pytest
from fastmim_pipelines import native_decode
from fastmim_pipelines.decode import read_picture
from PIL import Image

DECODER, WHY_NOT = native_decode.load()

needs_native = pytest.mark.skipif(DECODER is None, reason=WHY_NOT)
DONE, UNREADABLE, OTHER_KIND, TOO_LARGE, DAMAGED = range(5)


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
