"""Registers compiled kernels with torch.library, so that autograd, torch.compile and torch.export know them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastmim", "FRAGMENT")


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    device_type: str = "cpu",
    backward: Callable | None = None,
    save: Callable | None = None,
) -> Callable:
    """Register ``fastmim::<schema>`` and return the op.

    Args:
        schema: e.g. "native_gather_tokens(Tensor x, Tensor ids) -> Tensor".
        implementation: computes it on tensors of ``device_type``.
        fake: returns empty tensors of the right shapes, dtypes and strides.
        backward, save: gradient and setup_context, as ``torch.library.register_autograd`` takes them.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, implementation, device_type.upper())
    torch.library.register_fake(f"fastmim::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastmim::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.fastmim, name)


def no_second_derivative(function: str) -> Callable:
    """For ``backward`` of an op that computes a gradient: says that the gradient cannot be differentiated."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"{function}: expected a first derivative, got a request to differentiate it; this backend has none: set "
            "FASTMIM_KERNELS=reference."
        )

    return refuse
