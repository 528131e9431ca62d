"""Registers ops with torch.library: one definition per op, whichever compiled implementation computes it.

``fastmim::<name>`` is computed by the function ``<name>`` of the folder's native.py or kernel.py. Which one is decided at
the call (dispatch.py), also in a compiled graph. The reference is no part of it: autograd and torch.compile look into it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import dispatch

LIBRARY = torch.library.Library("fastmim", "FRAGMENT")


def define(
    folder: str,
    schema: str,
    allocate: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``fastmim::<schema>`` and return the op.

    Args:
        folder: of the op, e.g. "gather".
        schema: e.g. "gather_tokens(Tensor x, Tensor ids) -> Tensor".
        allocate: returns empty tensors of the right shapes, dtypes and strides: what the implementations write to, and
            what torch.compile traces.
        save, backward: setup_context and gradient, as ``torch.library.register_autograd`` takes them. An op that
            computes a gradient (``..._backward``) and has none itself says so when it is differentiated.
    """
    name = schema.partition("(")[0]

    def compute(*args: Any) -> Any:
        device = (args[0] if isinstance(args[0], Tensor) else next(_tensors(args))).device
        function = getattr(dispatch.compiled(folder, device.type), name)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args)
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return function(*args)

    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"fastmim::{name}", allocate, lib=LIBRARY)
    if name.endswith("_backward"):
        backward = backward or (lambda ctx, *grads: refuse_second_derivative(name.removesuffix("_backward")))
    if backward is not None:
        torch.library.register_autograd(f"fastmim::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.fastmim, name)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (t for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(t, Tensor))


def refuse_second_derivative(function: str) -> None:
    """Raises: NotImplementedError. A wrong number would be the alternative."""
    raise NotImplementedError(
        f"{function}: expected a first derivative, got a request to differentiate it; compiled kernels have none: set "
        "FASTMIM_KERNELS=reference."
    )
