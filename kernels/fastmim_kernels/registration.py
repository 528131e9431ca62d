"""Registers ops with torch.library: one definition per op, whichever compiled implementation computes it.

``fastmim::<name>`` is computed by the function ``<name>`` of the folder's native.py or kernel.py. Which one is decided at
the call (dispatch.py), also in a compiled graph. The reference is no part of it: autograd and torch.compile look into it.

Between a call and that function torch's dispatcher takes 30 to 90 us of a CPU, as its caches are. Where it would find
nobody to tell and nothing to do (`_is_plain`), the function is called at once.
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
    """Register ``fastmim::<schema>`` and return what calls it, with arguments by position.

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
    op = getattr(torch.ops.fastmim, name)
    # torch counts how often a tensor is written to.
    return op if "!" in schema else _shortened(op, compute, save, backward)


def _shortened(op: Callable[..., Any], compute: Callable[..., Any], save, backward) -> Callable[..., Any]:
    function = None
    if save is not None:

        def forward(ctx, *args: Any) -> Any:
            out = compute(*args)
            save(ctx, args, out)
            return out

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(op.__name__, (torch.autograd.Function,), methods)

    def call(*args: Any) -> Any:
        if not _is_plain(args):
            return op(*args)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args))):
            return compute(*args)
        return op(*args) if function is None else function.apply(*args)

    call.__wrapped__ = op
    return call


# Who may want to see an op: torch.compile, the profiler, modes (fake tensors, checkpoints by op), transforms, torch.jit.
LISTENERS = (
    torch.compiler.is_compiling,
    torch.autograd._profiler_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
)
TENSORS = {Tensor, torch.nn.Parameter}
# No more: a subclass, of a number too, may stand for anything.
OTHERS = {type(None), bool, int, float, list, tuple, torch.dtype}


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher would do nothing but call autograd and the kernel: nobody listens, and tensors are numbers
    in memory, in no disguise (subclass, a view that negates them, zeros that take no place)."""
    for listens in LISTENERS:
        if listens():
            return False
    for arg in args:
        kind = type(arg)
        if kind in TENSORS:
            if not (arg.is_cpu or arg.is_cuda) or arg.is_neg() or arg._is_zerotensor():
                return False
        elif kind not in OTHERS:
            return False
    return True


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        yield from (t for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(t, Tensor))


def refuse_second_derivative(function: str) -> None:
    """Raises: NotImplementedError. A wrong number would be the alternative."""
    raise NotImplementedError(
        f"{function}: expected a first derivative, got a request to differentiate it; compiled kernels have none: set "
        "FASTMIM_KERNELS=reference."
    )
