"""From a file to uint8 pixels of a box. Everything that can be wrong with a file ends in a DataError naming it."""

from __future__ import annotations

import io
import math
import os
import stat
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from .native_decode import Encoded, FileSpan, choose, load
from .spec import DataError, printable

# Pillow remarks on odd metadata, which ImageNet is full of; it would flood the terminal. Once for the process and not
# around each call, because the list of filters belongs to all threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_BANDS = "write a gray page per band, or .npy files"
_SAMPLES_PER_PIXEL = 277
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_READ_ATTEMPTS = 3
_RETRY_SECONDS = 0.1  # doubles at each attempt: long enough for a busy network file system

Box = tuple[float, float, float, float]


class Picture:
    """A decoded image: `planes` holds one Pillow image of all channels, or one "L" image per channel."""

    def __init__(self, planes: list[Image.Image]):
        self.planes = planes
        self.width, self.height = planes[0].size

    def crop(self, box: Box, size: tuple[int, int], filter: str = "bicubic") -> np.ndarray:
        """The box (left, top, width, height), cut to the image, resized to (height, width) with antialiasing.

        Returns: uint8 (C, height, width).
        """
        (left, right), (top, bottom) = _within(self.width, box[0], box[2]), _within(self.height, box[1], box[3])
        corners = (left, top, right, bottom)
        resample = Image.Resampling[filter.upper()]
        resized = [np.asarray(plane.resize((size[1], size[0]), resample, box=corners)) for plane in self.planes]
        if len(resized) > 1 or resized[0].ndim == 2:
            return np.stack(resized)
        return resized[0].transpose(2, 0, 1)


def _within(limit: int, start: float, length: float) -> tuple[float, float]:
    """Start and end of what lies in 0..limit, never empty. The same as in csrc/batch.cpp."""
    first = min(max(start, 0), limit - 1)
    return first, min(max(start + length, first + 1e-3), limit)


class CropReader:
    """Cuts boxes out of many images at once: by the native decoder what it takes, by Pillow the rest; the same pixels.

    Args:
        crops: (height, width) and filter of each crop of an image.
        in_chans: channels; 1, 3 or 4 of image files, any number of .npy files and of TIFF files with a page per channel.
        threads: that decode.
    Attributes:
        device: where the crops are.
        uses_native: whether the native decoder runs.
        reason: one line that says which decoder runs and why.
    """

    device = "cpu"

    def __init__(self, crops: Sequence[tuple[tuple[int, int], str]], in_chans: int, threads: int = 1):
        self.crops, self.in_chans, self.threads = list(crops), in_chans, threads
        decoder, self.reason = choose()
        if decoder is not None and in_chans not in (1, 3):
            self.reason = f"Pillow decodes: the native decoder gives 1 or 3 channels, not {in_chans}"
        # Not the decoder itself: this object goes to worker processes, which load their own.
        self.uses_native = decoder is not None and in_chans in (1, 3)

    def read(
        self,
        images: Sequence[Encoded],
        names: Sequence[str],
        boxes_of: Callable[[int, int, int], Sequence[Box]],
        out: Sequence[np.ndarray],
    ) -> list[DataError | None]:
        """Decode each image once, and write its crops.

        Args:
            images: what holds the bytes of each.
            names: what messages call each; the path where there is one.
            boxes_of: number in `images`, width, height -> one box per crop: left, top, width, height in pixels.
            out: per crop uint8 (images, in_chans, height, width), contiguous; arrays, or tensors on the CPU.
        Returns:
            For each image None, or why it is unusable; its places in `out` then hold anything.
        """
        out = [np.asarray(array) for array in out]
        errors: list[DataError | None] = [None] * len(images)
        rest = self._read_natively(images, boxes_of, out) if self.uses_native else list(range(len(images)))

        def read_one(number: int) -> None:
            try:
                picture = read_picture(images[number], self.in_chans, names[number])
            except DataError as e:
                errors[number] = e.alone()
                return
            boxes = boxes_of(number, picture.width, picture.height)
            for (size, filter), box, array in zip(self.crops, boxes, out):
                array[number] = picture.crop(box, size, filter)

        if self.threads > 1 and len(rest) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(read_one, rest))
        else:
            for number in rest:
                read_one(number)
        return errors

    def _read_natively(self, images, boxes_of, out) -> list[int]:
        """Returns the numbers of those that are left to Pillow."""
        decoder, _ = load()
        with decoder.open(images, self.threads) as batch:
            boxes = np.zeros((len(self.crops), len(images), 4))
            sizes = list(zip(batch.widths.tolist(), batch.heights.tolist()))
            for number in np.flatnonzero(batch.status == 0).tolist():
                boxes[:, number] = boxes_of(number, *sizes[number])
            batch.crop(boxes, [filter for _, filter in self.crops], out)
            return np.flatnonzero(batch.status).tolist()


def read_picture(image: Encoded, in_chans: int, name: str | None = None) -> Picture:
    """Decode a whole file into `in_chans` channels of 8 bits.

    EXIF rotation is ignored, as torchvision's ImageFolder does: pictures are seen as stored.

    Args:
        name: what a message calls the image; default: its path.
    Raises:
        DataError: the file cannot be read, is not an image of a known format, is damaged or cut short, is larger than
            Pillow's limit of pixels, or has another number of channels.
    """
    if name is None:
        name = image if isinstance(image, str) else "image"
    try:
        if name.lower().endswith(".npy") and not (isinstance(image, FileSpan) and image.width):
            return _from_array(image, in_chans)
        return _from_image(image, in_chans)
    # Decoders fed with hostile bytes raise almost anything (SyntaxError, struct.error, IndexError, ...).
    except Exception as e:
        reason = _reason(e)
        raise DataError(f"{printable(name)}: {reason}", path=name, reason=reason) from e


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


def read_bytes(image: Encoded) -> bytes | bytearray | memoryview:
    """The bytes of a file, with some patience for a file system that has its moments."""
    if not isinstance(image, str | FileSpan):
        return memoryview(image)
    for attempt in range(_READ_ATTEMPTS):
        try:
            data = _read_span(image) if isinstance(image, FileSpan) else _read_file(image)
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


def _open(path: str) -> int:
    # A pipe that took the place of a file must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _Unusable("cannot be read (not a regular file)")
    return descriptor


def _read_file(path: str) -> bytes:
    with open(_open(path), "rb") as file:
        return file.read()


def _read_span(span: FileSpan) -> bytes:
    if span.size <= 0:
        raise _Unusable("the file that holds it does not tell a possible place for it")
    descriptor = span.descriptor if span.descriptor >= 0 else _open(span.path)
    try:
        data = os.pread(descriptor, span.size, span.offset)
    finally:
        if span.descriptor < 0:
            os.close(descriptor)
    if len(data) < span.size:
        raise _Unusable(f"expected {span.size} bytes at {span.offset}, got {len(data)}: the file was cut short")
    return data


def _from_image(source: Encoded, in_chans: int) -> Picture:
    is_raw = isinstance(source, FileSpan) and source.width
    image = _raw_image(source) if is_raw else _open_image(read_bytes(source))
    _check_pixels(image.width, image.height)
    if in_chans > 1 and image.format == "TIFF" and image.is_animated:
        pages = _channel_pages(image, in_chans)
        if pages is not None:
            return Picture(pages)
    mode = _MODES.get(in_chans)
    if mode is None:
        raise _Unusable(
            f"expected {in_chans} channels, got an image file (1, 3 or 4, or a TIFF file of {in_chans} gray pages); "
            "use .npy files for other counts"
        )
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if (
        mode == "RGBA"
        and image.format == "TIFF"
        and image.mode == "RGB"
        and image.tag_v2.get(_SAMPLES_PER_PIXEL, 3) > 3
    ):
        raise _Unusable(f"Pillow drops the fourth band of this TIFF file; {_BANDS}")
    image = image if image.mode == mode else image.convert(mode)
    # As one image, the fourth channel would be the weight of the others when it is resized.
    return Picture(list(image.split()) if mode == "RGBA" else [image])


def _open_image(data: bytes | bytearray | memoryview) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        if bytes(data[:4]) in _TIFF_STARTS:
            raise _Unusable(
                f"a TIFF file that Pillow does not read, such as one of many bands in a page; {_BANDS}"
            ) from None
        raise


def _check_pixels(width: int, height: int) -> None:
    # Pillow itself only warns of a decompression bomb up to twice its limit; here the limit is the limit.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _channel_pages(image: Image.Image, in_chans: int) -> list[Image.Image] | None:
    """The pages of a TIFF file that has one gray page of the same size per channel; None for any other."""
    size, pages = image.size, []
    for number in range(in_chans + 1):
        try:
            image.seek(number)
        except EOFError:
            break
        is_gray = image.mode in ("1", "L") or image.mode.startswith(("I", "F"))
        if number == in_chans or image.size != size or not is_gray:
            pages = []
            break
        image.load()
        pages.append(image.convert("L") if image.mode in ("1", "L") else _to_8_bits(image))
    if len(pages) == in_chans:
        return pages
    image.seek(0)
    return None


def _raw_image(span: FileSpan) -> Image.Image:
    if span.size != 3 * span.width * span.height:
        raise _Unusable(f"expected 3 bytes for each of {span.width} x {span.height} pixels, got {span.size}")
    _check_pixels(span.width, span.height)
    return Image.frombuffer("RGB", (span.width, span.height), read_bytes(span), "raw", "RGB", 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits by its high byte: Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 0xFFFF:
        raise _Unusable(f"expected 8 or 16 bits per channel, got Pillow mode {image.mode}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_array(source: Encoded, in_chans: int) -> Picture:
    # Mapped or compared with the bytes at hand, so that a header which claims a giant array fails on the size and not on
    # memory.
    if isinstance(source, str):
        os.close(_open(source))  # says what is wrong
        with np.errstate(over="raise"):  # the size itself may be more than 64 bits hold
            array = np.load(source, mmap_mode="r", allow_pickle=False)
    else:
        array = _array_of(source)
    is_usable = isinstance(array, np.ndarray) and array.dtype.kind == "u" and array.dtype.itemsize <= 2
    if not is_usable or array.ndim not in (2, 3) or not array.size:
        raise _Unusable(f"expected a uint8 or uint16 array (H, W) or (H, W, {in_chans}), got {_describe(array)}")
    _check_pixels(array.shape[1], array.shape[0])
    planes = array[..., None] if array.ndim == 2 else array
    if planes.shape[2] != in_chans:
        hint = ", the first axis having as many: arrays are (H, W, C)" if planes.shape[0] == in_chans else ""
        raise _Unusable(f"expected {in_chans} channels, got {planes.shape[2]}{hint}")
    shift = 8 * (planes.dtype.itemsize - 1)  # the high byte, as of 16-bit image files
    return Picture([Image.fromarray((planes[..., c] >> shift).astype(np.uint8, order="C")) for c in range(in_chans)])


def _array_of(source: Encoded) -> np.ndarray:
    file = io.BytesIO(read_bytes(source))
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    data = file.read()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise _Unusable(f"expected the bytes of {dtype} {shape}, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _describe(array: object) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
