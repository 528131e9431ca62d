"""Finds the C++ library of the CPU kernels (kernels/csrc), loads it and calls its functions.

There is one library per instruction set, and the one for torch's own CPU capability is taken (``ATEN_CPU_CAPABILITY``
lowers both); with AVX512 the one that multiplies bfloat16, by vectors (AVX512_BF16) or on matrix tiles (AMX), where the CPU
does. It lies in a folder of this package: in an installed wheel beside this file; in an editable install in site-packages;
in a plain checkout where ``cmake --install build/native --prefix kernels`` puts it.
"""

import ctypes
import functools
import hashlib
import pathlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

# Element types as kernels/csrc/kernel.h numbers them.
DTYPES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# Floating dtypes that the kernels know. They compute in float32, so wider ones are left to the reference.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


class Entry(ctypes.Structure):
    """An exported function: one letter per argument type, and its address."""

    _fields_ = (("arguments", ctypes.c_char_p), ("address", ctypes.c_void_p))


def candidates() -> list[pathlib.Path]:
    """Where the library may lie, best first."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    has_products = capability == "avx512" and torch.cpu._is_avx512_bf16_supported()
    kinds = ["amx"] * (has_products and has_tiles()) + ["bf16"] * has_products + [capability, "default"]
    names = dict.fromkeys(f"_native_{kind}.so" for kind in kinds)
    return [pathlib.Path(folder) / name for name in names for folder in sys.modules[__package__].__path__]


def has_tiles() -> bool:
    """Whether matrix tiles (AMX) are there, and the system, which may deny them, gives them to this process."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def sources_digest(folder: pathlib.Path) -> str:
    """Digest of the C++ files in ``folder``, as CMakeLists.txt computes it."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    return hashlib.sha256("".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files).encode()).hexdigest()


def _built_from(loaded: ctypes.CDLL) -> str:
    try:
        return ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "fastmim_sources"))).decode()
    except ValueError:
        return "unknown"


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises: ImportError where there is none or it is out of date, OSError where it does not load."""
    path = next((path for path in candidates() if path.exists()), None)
    if path is None:
        raise ImportError(
            f"no {candidates()[-1].name} in {', '.join(sys.modules[__package__].__path__)}; "
            "install fastmim where a C++ compiler is, or build it with cmake"
        )
    loaded = ctypes.CDLL(str(path))
    sources = pathlib.Path(__file__).resolve().parent.parent / "csrc"
    if sources.is_dir() and _built_from(loaded) != sources_digest(sources):
        raise ImportError(f"{path} was built from other sources than {sources} holds now; build it anew")
    _call(loaded, "use_openmp")(*_openmp())
    return loaded


def _openmp() -> list[int | None]:
    """Addresses in the OpenMP runtime that torch has loaded, so that both share one pool of threads; None where it has
    another (the kernels then run on one thread)."""
    try:
        torch_cpu = ctypes.CDLL(str(next(pathlib.Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        return [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in OPENMP]
    except (StopIteration, OSError, AttributeError):
        return [None] * len(OPENMP)


def _call(loaded: ctypes.CDLL, name: str) -> Callable[..., int]:
    try:
        entry = Entry.in_dll(loaded, f"fastmim_{name}")
    except ValueError as e:
        raise ImportError(
            f"{loaded._name} has no function {name}: it was built from other sources; build it anew"
        ) from e
    return ctypes.CFUNCTYPE(ctypes.c_int, *(LETTERS[letter] for letter in entry.arguments.decode()))(entry.address)


def function(name: str) -> Callable[..., None]:
    """The C function ``name``: called with numbers, ctypes arrays, None, or tensors, whose addresses are passed.

    Raises: ImportError or OSError where the library is missing or too old. The function raises IndexError,
            MemoryError or TypeError by its status, and ImportError where the CPU cannot run it.
    """
    call = _call(library(), name)

    def checked(*arguments: object) -> None:
        status = call(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
        if status == 1:
            raise MemoryError(f"{name}: no memory for the kernel's scratch space; use a smaller batch")
        if status == 2:
            raise IndexError(f"{name}: expected ids and offsets inside the image, got one outside; correct them")
        if status == 4:
            raise ImportError(
                f"{name}: this CPU, or this system, lacks instructions that it needs (AVX512_BF16 or AMX)"
            )
        if status:
            raise TypeError(f"{name}: expected a dtype of {[str(d) for d in DTYPES]}, got another; convert the tensor")

    return checked


def integers(*values: int) -> ctypes.Array:
    """A C array of int64."""
    return (ctypes.c_int64 * len(values))(*values)


def floats(values: list[float]) -> ctypes.Array:
    """A C array of float."""
    return (ctypes.c_float * len(values))(*values)
