"""Tensors out of the files of `torch.save`, without running anything that such a file says.

A pickle is a program: it names functions and has them called. Here every name but a few of torch's means an inert
stand-in that keeps what it is given, and a name that is not expected ends the reading. So a whole saved module, whose
classes need not exist here, comes out as its tensors by name.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastmim.config import ConfigError

# What a file of torch < 1.6 begins with, as an integer in a pickle of its own. Source: torch/serialization.py.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# Modules whose classes and functions become stand-ins, with all that is below them.
INERT_MODULES = ("dall_e", "torch.nn")
INERT_NAMES = {("functools", "partial"), ("torch", "device"), ("torch", "Size")}
# Objects that a pickle may number; the published one has a few thousand. C Python makes a table of the largest number.
MOST_OBJECTS = 1 << 20
# What reading a damaged or hostile pickle may raise. Source: documentation of pickle.UnpicklingError, and trial.
PICKLE_ERRORS = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Inert:
    """Stands in for any object of an expected class, and for any expected function."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class StorageType(NamedTuple):
    dtype: torch.dtype


class Storage(NamedTuple):
    """Numbers somewhere in the file."""

    dtype: torch.dtype
    key: str
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.dtype.itemsize


class View(NamedTuple):
    """A tensor that is still in the file."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, data: bytearray) -> Tensor:
        flat = torch.frombuffer(data, dtype=self.storage.dtype) if data else torch.empty(0, dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


def rebuild_tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> View:
    """In place of torch's function of the same purpose; refuses what reaches beyond its storage."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, Storage) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage or with unequal sizes and strides")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor with offset, size, stride {numbers}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) > storage.count or (math.prod(size) and last >= storage.count):
        raise pickle.UnpicklingError(f"a tensor of size {size} in a storage of {storage.count} numbers")
    return View(storage, offset, tuple(size), tuple(stride))


def rebuild_parameter(data: View, *_: Any) -> View:
    return data


# Both spellings of the module: pickles of protocol 2 keep Python 2's.
CALLED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
}


class Reader(pickle.Unpickler):
    """An unpickler that knows no way out of this file."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.file = file
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        start = self.file.tell()
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > MOST_OBJECTS:
                raise pickle.UnpicklingError(f"it numbers an object {argument}")
        self.file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in CALLED:
            return CALLED[module, name]
        if module == "torch" and name in DTYPES:
            return StorageType(DTYPES[name])
        if (module, name) in INERT_NAMES or any(f"{module}.".startswith(f"{known}.") for known in INERT_MODULES):
            return Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights have no use for")

    def persistent_load(self, what: Any) -> Any:
        if isinstance(what, tuple) and len(what) == 4 and what[0] == "module":
            return what[1]  # legacy files put a class together with its source code
        if not isinstance(what, tuple) or len(what) < 5 or what[0] != "storage" or any(what[5:]):
            raise pickle.UnpicklingError("a reference that is no plain storage")
        _, kind, key, _, count = what[:5]
        is_plain = isinstance(kind, StorageType) and isinstance(key, str) and isinstance(count, int) and count >= 0
        if not is_plain or self.storages.get(key, (kind.dtype,))[0] != kind.dtype:
            raise pickle.UnpicklingError("a storage without type, name or size, or with two of them")
        storage = Storage(kind.dtype, key, count)
        return self.storages.setdefault(key, storage)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a state dict or a whole module that `torch.save` wrote, in its present or its old format.

    Raises:
        ConfigError: the file is of another kind, damaged, or asks for anything else than tensors.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            if start.lstrip()[:1] == b"<":
                raise pickle.UnpicklingError("it is a web page: the download went wrong")
            reader = _read_zip if start == b"PK\x03\x04" else _read_legacy
            return reader(file)
    except (*PICKLE_ERRORS, zipfile.BadZipFile, OSError) as e:
        raise ConfigError(f"{path}: expected weights that torch.save wrote: {e or type(e).__name__}") from e


def _read_zip(file: BinaryIO) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        index = next((name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        if index is None:
            raise pickle.UnpicklingError("the archive has no data.pkl")
        root = index.removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise pickle.UnpicklingError("the archive is compressed, which torch.save never does")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are not little-endian")
        reader = Reader(io.BytesIO(archive.read(index)))
        views = dict(named_views(reader.load()))
        data = {}
        for key in {view.storage.key for view in views.values()}:
            name = f"{root}data/{key}"
            if archive.getinfo(name).file_size != reader.storages[key].num_bytes:
                raise pickle.UnpicklingError(f"{name} has another size than the index says")
            data[key] = bytearray(archive.read(name))
    return {name: view.tensor(data[view.storage.key]) for name, view in views.items()}


def _read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    if Reader(file).load() != LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is a pickle of something else")
    Reader(file).load()  # version of the format
    Reader(file).load()  # the system that wrote it; all in use are little-endian
    reader = Reader(file)
    views = dict(named_views(reader.load()))
    data = {}
    for key in Reader(file).load():
        storage = reader.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise pickle.UnpicklingError(f"storage {key} has another size than the index says")
        data[key] = bytearray(file.read(storage.num_bytes))
        if len(data[key]) != storage.num_bytes:
            raise pickle.UnpicklingError("it ends too early")
    return {name: view.tensor(data[view.storage.key]) for name, view in views.items()}


def named_views(root: Any) -> Iterator[tuple[str, View]]:
    """Tensors of a state dict, or of a stand-in for a module and all modules in it, by the names of a state dict."""
    if isinstance(root, dict):
        yield from ((name, value) for name, value in root.items() if isinstance(value, View))
        return
    seen: set[int] = set()
    found: list[tuple[str, Any]] = [("", root)]
    while found:
        prefix, node = found.pop()
        if not isinstance(node, Inert) or id(node) in seen:
            continue
        seen.add(id(node))
        for kind in ("_parameters", "_buffers"):
            for name, value in (node.state.get(kind) or {}).items():
                if isinstance(value, View):
                    yield f"{prefix}{name}", value
        found += [(f"{prefix}{name}.", part) for name, part in (node.state.get("_modules") or {}).items()]
