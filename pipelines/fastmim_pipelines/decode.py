"""From a file to uint8 pixels of a box. Everything that can be wrong with a file ends in a DataError naming it."""

from __future__ import annotations

import io
import time
import warnings

import numpy as np
from PIL import Image

from .spec import DataError, printable

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_READ_ATTEMPTS = 3
_RETRY_SECONDS = 0.1  # doubles at each attempt: long enough for a busy network file system

Box = tuple[float, float, float, float]


class Picture:
    """A decoded image: `planes` holds one Pillow image of all channels, or one "L" image per channel."""

    def __init__(self, planes: list[Image.Image]):
        self.planes = planes
        self.width, self.height = planes[0].size

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """The box (left, top, width, height) resized to (height, width), bicubic with antialiasing: uint8 (C, h, w)."""
        left, top, width, height = box
        corners = (left, top, left + width, top + height)
        resized = [
            np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=corners)) for plane in self.planes
        ]
        if len(resized) > 1 or resized[0].ndim == 2:
            return np.stack(resized)
        return resized[0].transpose(2, 0, 1)


def read_picture(path: str, in_chans: int) -> Picture:
    """Decode a whole file into `in_chans` channels of 8 bits.

    EXIF rotation is ignored, as torchvision's ImageFolder does: pictures are seen as stored.

    Raises:
        DataError: the file cannot be read, is not an image of a known format, is damaged or cut short, is larger than
            Pillow's limit of pixels, or has another number of channels.
    """
    with warnings.catch_warnings():
        # Remarks on odd metadata, which ImageNet is full of, would flood the terminal. But where Pillow only warns of a
        # decompression bomb (it refuses at twice that size), here the limit is the limit.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _from_array(path, in_chans) if path.lower().endswith(".npy") else _from_image(path, in_chans)
        # Decoders fed with hostile bytes raise almost anything (SyntaxError, struct.error, IndexError, ...).
        except Exception as e:
            reason = _reason(e)
            raise DataError(f"{printable(path)}: {reason}", path=path, reason=reason) from e


class _Unusable(Exception):
    """Why a file is of no use; read_picture adds the path."""


def _reason(error: Exception) -> str:
    """One line for a person who has to look after the file."""
    if isinstance(error, _Unusable):
        return str(error)
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, refused"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(_FORMATS)})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    return printable(f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})")


def _read(path: str) -> bytes:
    for attempt in range(_READ_ATTEMPTS):
        try:
            with open(path, "rb") as file:
                data = file.read()
            if not data:
                raise _Unusable("the file is empty")
            return data
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            if attempt + 1 == _READ_ATTEMPTS:
                raise
            time.sleep(_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _from_image(path: str, in_chans: int) -> Picture:
    mode = _MODES.get(in_chans)
    if mode is None:
        raise _Unusable(f"expected {in_chans} channels, got an image file (1, 3 or 4); use .npy files for other counts")
    image = Image.open(io.BytesIO(_read(path)), formats=_FORMATS)
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    return Picture([image if image.mode == mode else image.convert(mode)])


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits by its high byte: Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 0xFFFF:
        raise _Unusable(f"expected 8 or 16 bits per channel, got Pillow mode {image.mode}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_array(path: str, in_chans: int) -> Picture:
    # Mapped, so that a header which claims a giant array fails on the file's size and not on memory.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise _Unusable(f"expected a uint8 array (H, W) or (H, W, {in_chans}), got {_describe(array)}")
    limit: int | None = Image.MAX_IMAGE_PIXELS
    if limit is not None and array.shape[0] * array.shape[1] > limit:
        raise _Unusable(f"more than {limit} pixels, refused")
    planes = array[..., None] if array.ndim == 2 else array
    if planes.shape[2] != in_chans:
        raise _Unusable(f"expected {in_chans} channels, got {planes.shape[2]}")
    return Picture([Image.fromarray(np.ascontiguousarray(planes[..., c])) for c in range(in_chans)])


def _describe(array: object) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
