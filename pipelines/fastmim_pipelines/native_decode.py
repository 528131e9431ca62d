"""The native decoder: finding, checking and calling the library built from pipelines/csrc.

It reads JPEG files, decodes only what a box needs and resizes it, several boxes from one decode, in threads that hold no
interpreter lock. What it gives equals Pillow's pixels bit for bit, which is checked when it is loaded; files that it does
not take it leaves to Pillow. `python -m fastmim_pipelines.native_decode` tells which decoder runs and why; with the word
`build` it builds the library first, in a checkout of the sources.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

VARIABLE = "FASTMIM_DECODE"
CHOICES = ("pillow", "native")
FILTERS = ("bilinear", "bicubic", "lanczos")  # in the order of the enum Filter of csrc/decode.h
_VERSION = 3
_NO_LIMIT = 1 << 62
_SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_BUILD_ADVICE = "build it with `python -m fastmim_pipelines.native_decode build` (needs g++ or clang++)"


class FileSpan(NamedTuple):
    """Part of a file: of an open one, or of the one at the path."""

    path: str
    offset: int
    size: int
    descriptor: int = -1
    width: int = 0
    """If not 0: what is there is no image file, but `height` rows of `width` RGB pixels of 8 bits."""
    height: int = 0


# The bytes of an image file: a path, part of a file, or the bytes themselves.
Encoded = str | FileSpan | bytes | bytearray | memoryview | np.ndarray


class NativeDecoder:
    """The library, with libjpeg bound to it. Made by `load` alone."""

    def __init__(self, library: ctypes.CDLL, libjpeg: str, begins_down: bool):
        self._library, self.libjpeg, self._begins_down = library, libjpeg, begins_down

    def open(self, images: Sequence[Encoded], threads: int = 1) -> NativeBatch:
        """Read files and their headers; fastest if all images are given in one way."""
        return NativeBatch(self._library, images, threads, self._begins_down)


class NativeBatch:
    """Files that were read. Use as a context manager.

    Attributes:
        widths, heights: (n,) int32, of those with status 0.
        status: (n,) int32: 0, or why the file is left to Pillow (the enum Status of csrc/decode.h).
    """

    def __init__(self, library: ctypes.CDLL, images: Sequence[Encoded], threads: int, begins_down: bool):
        count = len(images)
        self._library, self._threads, self._begins_down = library, threads, begins_down
        self._images = images  # keeps the bytes alive
        self.widths, self.heights, self.status = (np.zeros(count, np.int32) for _ in range(3))
        paths = descriptors = offsets = sizes = data = raw_sizes = None
        if all(isinstance(image, str) for image in images):
            paths = (ctypes.c_char_p * count)(*map(os.fsencode, images))
        elif all(isinstance(image, FileSpan) for image in images):
            paths = (ctypes.c_char_p * count)(*(os.fsencode(span.path) for span in images))
            numbers = np.array([span[1:] for span in images], np.int64).T
            offsets, sizes = numbers[0].copy(), numbers[1].copy()
            descriptors, raw_sizes = numbers[2].astype(np.int32), np.ascontiguousarray(numbers[3:].T, np.int32)
        else:
            # Of several kinds, what is not at hand is left to Pillow.
            at_hand = [b"" if isinstance(image, str | FileSpan) else image for image in images]
            arrays = [np.frombuffer(image, np.uint8) for image in at_hand]
            data = (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays))
            sizes = np.array([array.size for array in arrays], np.int64)
        limit = Image.MAX_IMAGE_PIXELS
        self._handle = library.fastmim_decode_open(
            count, paths, _address(descriptors), _address(offsets), _address(sizes), data, _address(raw_sizes),
            _NO_LIMIT if limit is None else limit, threads,
            _address(self.widths), _address(self.heights), _address(self.status),
        )  # fmt: skip
        if not self._handle:
            raise MemoryError(f"native decoder: no memory for a batch of {count} files")

    def crop(self, boxes: np.ndarray, filters: Sequence[str], out: Sequence[np.ndarray]) -> None:
        """Decode, cut and resize; what goes wrong shows in `status`, and the file's places in `out` hold anything.

        Args:
            boxes: (crops, n, 4) float64: left, top, width, height in pixels; clamped to the image.
            filters: one of FILTERS per crop.
            out: one array per crop to write to: uint8 (n, 1 or 3, height, width), contiguous.
        """
        count, channels = len(self.status), out[0].shape[1]
        boxes = np.ascontiguousarray(boxes, np.float64)
        if boxes.shape != (len(out), count, 4) or len(filters) != len(out) or channels not in (1, 3):
            raise ValueError(
                f"crop: expected boxes {(len(out), count, 4)} and 1 or 3 channels, got {boxes.shape}, {channels}."
            )
        for array in out:
            if array.dtype != np.uint8 or array.shape[:2] != (count, channels) or not array.flags.c_contiguous:
                raise ValueError(
                    f"crop: expected contiguous uint8 ({count}, {channels}, h, w), got {array.dtype} {array.shape}."
                )
        if not count:
            return
        sizes = np.array([array.shape[2:] for array in out], np.int32)
        kinds = np.array([FILTERS.index(name) for name in filters], np.int32)
        places = (ctypes.c_void_p * len(out))(*(array.ctypes.data for array in out))
        self._library.fastmim_decode_crop(
            self._handle, len(out), _address(boxes), _address(sizes), _address(kinds), places, channels,
            self._begins_down, self._threads, _address(self.status),
        )  # fmt: skip

    def __enter__(self) -> NativeBatch:
        return self

    def __exit__(self, *error: object) -> None:
        self._library.fastmim_decode_close(self._handle)
        self._handle = None


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def choose() -> tuple[NativeDecoder | None, str]:
    """The decoder to use (None: Pillow), and one line that says which and why.

    Raises:
        ValueError: FASTMIM_DECODE asks for what there is not.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *CHOICES):
        raise ValueError(f"{VARIABLE}: expected {' or '.join(CHOICES)}, got {wanted!r}.")
    if wanted == "pillow":
        return None, f"Pillow decodes: {VARIABLE}=pillow"
    decoder, why_not = load()
    if decoder is not None:
        return decoder, f"native decoder with {Path(decoder.libjpeg).name}"
    if wanted == "native":
        raise ValueError(f"{VARIABLE}: expected the native decoder, but {why_not}.")
    return None, f"Pillow decodes: {why_not}"


@functools.cache
def load() -> tuple[NativeDecoder | None, str]:
    """The native decoder, or None and why there is none."""
    built = [
        path for folder in sys.modules[__package__].__path__ for path in glob.glob(os.path.join(folder, "_decode*.so"))
    ]
    if not built:
        return None, f"the native decoder is not built; {_BUILD_ADVICE}"
    libjpegs = _libjpegs()
    if not libjpegs:
        return None, "no shared libjpeg was found that Pillow uses"
    reasons = []
    for path in built:
        for libjpeg in libjpegs:
            decoder, why_not = _load(path, libjpeg)
            if decoder is not None:
                return decoder, ""
            reasons.append(why_not)
    return None, reasons[0]


def _load(path: str, libjpeg: str) -> tuple[NativeDecoder | None, str]:
    try:
        library = ctypes.CDLL(path)
        if library.fastmim_decode_version() != _VERSION:
            return None, f"{path} was built from other sources; {_BUILD_ADVICE}"
    except (OSError, AttributeError) as e:
        return None, f"{path} cannot be loaded ({e}); {_BUILD_ADVICE}"
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.fastmim_decode_load.argtypes = [ctypes.c_char_p]
    library.fastmim_decode_load.restype = ctypes.c_char_p
    library.fastmim_decode_open.argtypes = [number, *[pointer] * 6, ctypes.c_int64, number, *[pointer] * 3]
    library.fastmim_decode_open.restype = pointer
    library.fastmim_decode_crop.argtypes = [pointer, number, *[pointer] * 4, number, number, number, pointer]
    library.fastmim_decode_crop.restype = None
    library.fastmim_decode_close.argtypes = [pointer]
    library.fastmim_decode_close.restype = None
    why_not = library.fastmim_decode_load(os.fsencode(libjpeg))
    if why_not is not None:
        return None, f"{libjpeg} cannot be used ({why_not.decode(errors='replace')})"
    # Pillow 13 changed the order of the resampler's passes for some shapes: take the order that gives its pixels.
    for begins_down in (True, False):
        decoder = NativeDecoder(library, libjpeg, begins_down)
        if _equals_pillow(decoder):
            return decoder, ""
    return None, f"its pixels differ from those of Pillow {PIL.__version__} on this machine"


def _libjpegs() -> list[str]:
    """Where the libjpeg may lie that Pillow uses: beside it in a wheel, or anywhere, but then it is loaded."""
    from PIL import _imaging  # noqa: F401  loads it

    package = os.path.dirname(PIL.__file__)
    found = glob.glob(os.path.join(package, "..", "pillow.libs", "libjpeg*.so*"))
    found += glob.glob(os.path.join(package, ".dylibs", "libjpeg*.dylib"))
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(None, 5)[5] for line in lines if "/libjpeg" in line and len(line.split(None, 5)) == 6]
    return list(dict.fromkeys(os.path.realpath(path) for path in [*found, *names]))


def _equals_pillow(decoder: NativeDecoder) -> bool:
    """Compare on pictures that take each path: wide and high ones, chroma whole and halved, each filter."""
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for size, subsampling in (((96, 40), 2), ((40, 150), 0), ((64, 64), 1)):
        image, file = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
        image.save(file, "JPEG", quality=90, subsampling=subsampling)
        image = Image.open(file)
        box = (7, 5, size[0] - 20, size[1] - 9)
        for name in FILTERS:
            out = np.empty((1, 3, 24, 20), np.uint8)
            with decoder.open([file.getvalue()]) as batch:
                batch.crop(np.array([[box]], np.float64), [name], [out])
                if batch.status[0]:
                    return False
            corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
            expected = np.asarray(image.resize((20, 24), Image.Resampling[name.upper()], corners))
            if not np.array_equal(out[0], expected.transpose(2, 0, 1)):
                return False
    return True


def build() -> str:
    """Compile the library into this package. Returns its path.

    Raises:
        RuntimeError: no sources here, no compiler, or one that fails.
    """
    sources = sorted(map(str, _SOURCES.glob("*.cpp")))
    if not sources:
        raise RuntimeError(f"build: expected sources in {_SOURCES}, got none; run it in a checkout of the sources.")
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])), None)
    if compiler is None:
        raise RuntimeError("build: expected a C++ compiler, got none; sudo apt-get install -y g++")
    target = str(Path(__file__).resolve().parent / "_decode.so")
    # Into place at once: others may be about to load the old one.
    command = [compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", *sources]
    result = subprocess.run([*command, "-o", f"{target}.new", "-ldl"], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"build: {' '.join(command)}: {result.stderr.strip()}")
    os.replace(f"{target}.new", target)
    return target


def main() -> None:
    if sys.argv[1:] == ["build"]:
        try:
            print(f"built {build()}")
        except RuntimeError as e:
            sys.exit(str(e))
    elif sys.argv[1:]:
        sys.exit(f"usage: python -m {__package__}.native_decode [build]")
    try:
        print(choose()[1])
    except ValueError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
