"""Which implementation of an op runs: the one place where that is decided.

Default: cuda -> triton, cpu -> native, each where the op has it and computes in the dtypes at hand, else reference.
``FASTMIM_KERNELS=reference|native|triton`` forces one for every op; it is read at each call (``torch.compile`` fixes
the choice between reference and compiled when it traces). An op has a backend when its folder has the file
(``native.py``, ``kernel.py``) and that file imports; nothing else has to be registered.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

VARIABLE = "FASTMIM_KERNELS"
PACKAGE = __name__.rpartition(".")[0]
# Backend -> file in the op's folder.
FILES = {"reference": "reference", "native": "native", "triton": "kernel"}
# Backend -> the device type that it computes on; the reference computes on any.
DEVICES = {"native": "cpu", "triton": "cuda"}
# Dtypes of values that compiled kernels take. They compute in float32, so wider ones are left to the reference.
COMPUTED = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
# (op, backend) -> module, filled by load().
LOADED: dict[tuple[str, str], ModuleType] = {}
# See `reference_of`.
_to_reference: frozenset[str] = frozenset()


@functools.cache
def ops() -> tuple[str, ...]:
    """Names of all ops: every folder of this package."""
    path = importlib.import_module(PACKAGE).__path__
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path) if found.ispkg))


def load(op: str, backend: str) -> str:
    """Import the module of ``op`` for ``backend`` into LOADED, once. Returns '' or the reason why there is none."""
    if (op, backend) not in LOADED:
        name = f"{PACKAGE}.{op}.{FILES[backend]}"
        if importlib.util.find_spec(name) is None:
            return f"the folder {op}/ has no {FILES[backend]}.py"
        try:
            LOADED[op, backend] = importlib.import_module(name)
        except (ImportError, OSError) as e:
            return f"{op}/{FILES[backend]}.py does not import ({type(e).__name__}: {e})"
    return ""


def _missing(op: str, backend: str, device_type: str) -> str:
    """'' if ``op`` has a backend that computes on ``device_type``, else the reason why not."""
    return _missing_when(op, backend, device_type, backend == "triton" and _is_interpreted())


@functools.cache
def _missing_when(op: str, backend: str, device_type: str, is_interpreted: bool) -> str:
    needed = DEVICES.get(backend, device_type)
    if needed != device_type and not is_interpreted:
        return f"{backend} computes on {needed} tensors, and these are on {device_type}"
    return load(op, backend)


def _is_interpreted() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(op: str, device_type: str) -> list[str]:
    """The backends that can compute ``op`` on tensors of ``device_type``, the reference among them."""
    return [backend for backend in FILES if not _missing(op, backend, device_type)]


@torch.compiler.assume_constant_result
def backend_of(op: str, device_type: str) -> str:
    """The backend that computes ``op`` on tensors of ``device_type``; its module is in LOADED afterwards.

    Raises: RuntimeError where ``FASTMIM_KERNELS`` names an unknown backend, or one that this op lacks on this device.
    """
    wanted = "reference" if op in _to_reference else os.environ.get(VARIABLE, "")
    if not wanted:
        preferred = next((backend for backend, device in DEVICES.items() if device == device_type), "reference")
        wanted = "reference" if _missing(op, preferred, device_type) else preferred
    if wanted not in FILES:
        raise RuntimeError(f"{VARIABLE}: expected one of {', '.join(FILES)}, got {wanted!r}; correct or unset it.")
    reason = _missing(op, wanted, device_type)
    if reason:
        raise RuntimeError(
            f"{op}: backend {wanted!r} is forced by {VARIABLE}, but {reason}; unset {VARIABLE} or set it to reference."
        )
    return wanted


@contextlib.contextmanager
def reference_of(op: str) -> Iterator[None]:
    """Within it, the reference computes ``op``."""
    global _to_reference
    before, _to_reference = _to_reference, _to_reference | {op}
    try:
        yield
    finally:
        _to_reference = before


def uses_reference(op: str, device: torch.device, *values: Tensor | torch.dtype | None) -> bool:
    """Whether the reference computes ``op`` on ``device`` from tensors, or to dtypes, like these.

    Inside transforms (torch.func, vmap) it does: they look into plain torch alone.

    Raises: as ``backend_of``.
    """
    if backend_of(op, device.type) == "reference" or is_transformed():
        return True
    dtypes = [value.dtype if isinstance(value, Tensor) else value for value in values if value is not None]
    return any(dtype not in COMPUTED for dtype in dtypes)


def is_transformed() -> bool:
    """Whether a transform (torch.func, vmap) looks on."""
    return torch._C._are_functorch_transforms_active()


def reference(op: str) -> ModuleType:
    """The module of the reference."""
    # Two steps, because torch.compile takes a constant string from an untraced call, but not a module.
    _loaded(op, "reference")
    return LOADED[op, "reference"]


@torch.compiler.assume_constant_result
def _loaded(op: str, backend: str) -> str:
    return load(op, backend)


def compiled_backend(op: str, device_type: str) -> str:
    """The backend, native or triton, that computes the registered ops of ``op`` on tensors of ``device_type``.

    Raises: NotImplementedError where there is none.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in DEVICES or _missing(op, wanted, device_type):
        wanted = next((backend for backend, device in DEVICES.items() if device == device_type), "native")
    reason = _missing(op, wanted, device_type)
    if reason:
        raise NotImplementedError(
            f"{op}: expected a compiled kernel for {device_type} tensors, got none ({reason}); call the function of "
            "fastmim_kernels, which falls back to torch."
        )
    return wanted


def compiled(op: str, device_type: str) -> ModuleType:
    """The module that computes the registered ops of ``op``. Raises: as ``compiled_backend``."""
    return LOADED[op, compiled_backend(op, device_type)]


def chosen(device_type: str) -> dict[str, str]:
    """Op -> the backend that runs on tensors of ``device_type`` ('cpu', 'cuda'). Raises: as ``backend_of``."""
    return {op: backend_of(op, device_type) for op in ops()}


def backends() -> dict[str, tuple[bool, str]]:
    """Backend -> (available, reason). A backend is available if at least one op can run with it on this machine."""
    found = {"reference": (True, "plain torch, every op, every device")}
    for backend, device_type in DEVICES.items():
        reasons = {op: load(op, backend) for op in ops()}
        ready = [op for op, reason in reasons.items() if not reason]
        broken = [reason for reason in reasons.values() if "does not import" in reason]
        if not ready:
            found[backend] = (False, broken[0] if broken else f"no op has {FILES[backend]}.py")
        elif device_type == "cuda" and not torch.cuda.is_available():
            found[backend] = (False, "torch sees no CUDA device")
        else:
            found[backend] = (True, "; ".join([f"ops: {', '.join(ready)}", *broken]))
    return found


def states() -> dict[str, str]:
    """Op -> what computes it on CPU and on CUDA tensors, with the reason where that is the reference, or nothing."""
    found = {}
    for op in ops():
        parts = []
        for backend, device_type in DEVICES.items():
            try:
                name = backend_of(op, device_type)
                reason = load(op, backend) if name == "reference" else ""
            except RuntimeError as e:
                name, reason = "none", str(e)
            parts.append(f"{device_type} {name}" + f" ({reason})" * bool(reason))
        found[op] = "; ".join(parts)
    return found
