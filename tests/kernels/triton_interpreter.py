"""Makes Triton's interpreter trustworthy: ``install()`` before the kernels are imported, with TRITON_INTERPRET=1 set.

As shipped (Triton 3.6 to 3.9) the interpreter
- keeps bfloat16 as 16-bit patterns and computes with the patterns as integers, silently; here bfloat16 is held as
  float32 that is rounded to nearest even after every operation, which is what a GPU stores;
- gives the results of comparisons the type of what was compared, so that masks turn into numbers;
- cannot make a Python integer of a scalar with numpy >= 2.4 (Triton 3.6 only);
- reads and writes any address; here an access outside the tensors that the kernel was given raises;
- runs programs in order; here the order can be permuted, to show that results do not depend on it.
"""

import os

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

# Tensors that kernels may reach through tables of addresses instead of arguments.
REACHABLE: list[torch.Tensor] = []
# Order in which programs run: "forward", "backward", or a seed.
ORDER = {"programs": "forward"}


def to_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(values))


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 patterns -> float32."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def is_bf16(dtype: tl.dtype) -> bool:
    return not isinstance(dtype, tl.pointer_type) and getattr(dtype, "scalar", dtype) == tl.bfloat16


def install() -> None:
    """Patch the interpreter, once."""
    if getattr(interpreter, "is_patched", False):
        return
    interpreter.is_patched = True
    hold_bf16_as_float32()
    fix_comparisons()
    fix_index()
    check_addresses()
    permute_programs()


def hold_bf16_as_float32() -> None:
    numpy_dtype, fits, init = interpreter._get_np_dtype, interpreter._validate_np_data_size, Handle.__init__
    interpreter._get_np_dtype = lambda dtype: np.dtype(np.float32) if is_bf16(dtype) else numpy_dtype(dtype)
    interpreter._validate_np_data_size = lambda data, dtype: data.itemsize <= 4 if is_bf16(dtype) else fits(data, dtype)

    def rounded_init(self, data, dtype, *args, **kwargs):
        if is_bf16(dtype) and isinstance(data, np.ndarray) and data.dtype.kind == "f":
            data = from_bits(to_bits(data.astype(np.float32)))
        init(self, data, dtype, *args, **kwargs)

    Handle.__init__ = rounded_init
    Builder.get_bf16 = lambda self, value: Handle(np.array([value], dtype=np.float32), tl.bfloat16)

    cast, round_float, bitcast, absolute = (
        Builder.cast_impl,
        Builder.create_fp_to_fp,
        Builder.create_bitcast,
        Builder.create_fabs,
    )

    def cast_bf16(self, source, target):
        if is_bf16(source.dtype) or is_bf16(target):
            return Handle(source.data.astype(interpreter._get_np_dtype(target)), target.scalar)
        return cast(self, source, target)

    def bitcast_bf16(self, source, target):
        if is_bf16(source.dtype) != is_bf16(target):
            data = to_bits(source.data) if is_bf16(source.dtype) else source.data
            data = from_bits(data) if is_bf16(target) else data.view(interpreter._get_np_dtype(target))
            return Handle(data, target.scalar)
        return bitcast(self, source, target)

    def round_float_bf16(self, source, target, mode):
        if is_bf16(source.dtype) or is_bf16(target):
            return cast_bf16(self, source, target)
        return round_float(self, source, target, mode)

    def absolute_bf16(self, value):
        return Handle(np.abs(value.data), tl.bfloat16) if is_bf16(value.dtype) else absolute(self, value)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_bf16, round_float_bf16
    Builder.create_bitcast, Builder.create_fabs = bitcast_bf16, absolute_bf16
    for name in ("create_int_to_ptr", "create_ptr_to_int"):
        setattr(Builder, name, bitcast_bf16)


def fix_comparisons() -> None:
    for name in dir(Builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            compare = getattr(Builder, name)
            boolean = lambda self, a, b, compare=compare: Handle(compare(self, a, b).data.astype(np.bool_), tl.int1)  # noqa: E731
            setattr(Builder, name, boolean)


def fix_index() -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope, *args):
        patch_tensor(tensor, scope, *args)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def check_addresses() -> None:
    """Loads and stores: inside a tensor that the kernel was given; bfloat16 through its bit patterns."""
    ranges: list[tuple[int, int]] = []
    call = interpreter.GridExecutor.__call__

    def noting(self, *args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values(), *REACHABLE) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        ranges[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = noting
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def check(what: str, pointers, mask) -> None:
        active = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(np.bool_)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        is_inside = np.zeros(active.shape, np.bool_)
        for low, high in ranges:
            is_inside |= (active >= low) & (active + np.uint64(size) <= high)
        if not is_inside.all():
            raise IndexError(f"{what} outside of every tensor of the kernel: {int((~is_inside).sum())} addresses")

    def checked_load(self, pointers, mask, other, *args, **kwargs):
        check("load", pointers, mask)
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *args, **kwargs)
        shape = pointers.data.shape
        filler = np.zeros(shape, np.uint16) if other is None else to_bits(np.broadcast_to(other.data, shape))
        bits = interpreter._interpreter.load(pointers.data, mask.data, filler, np.dtype(np.uint16))
        return Handle(from_bits(bits), tl.bfloat16)

    def checked_store(self, pointers, value, mask, *args, **kwargs):
        check("store", pointers, mask)
        if pointers.get_element_ty() != tl.bfloat16:
            return store(self, pointers, value, mask, *args, **kwargs)
        return interpreter._interpreter.store(pointers.data, to_bits(value.data), mask.data)

    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store


def permute_programs() -> None:
    set_dim, set_index = Builder.set_grid_dim, Builder.set_grid_idx

    def permuting_dim(self, x, y, z):
        set_dim(self, x, y, z)
        count, order = x * y * z, ORDER["programs"]
        if order == "forward":
            self.order = np.arange(count)
        else:
            self.order = (
                np.arange(count)[::-1] if order == "backward" else np.random.default_rng(order).permutation(count)
            )

    def permuted_index(self, x, y, z):
        _, size_y, size_z = self.grid_dim
        program = int(self.order[(x * size_y + y) * size_z + z])
        set_index(self, program // (size_y * size_z), program // size_z % size_y, program % size_z)

    Builder.set_grid_dim, Builder.set_grid_idx = permuting_dim, permuted_index


def version() -> str:
    return triton.__version__
