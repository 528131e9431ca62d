"""Products of 8-bit floats in the linear layers of blocks (--fp8).

targets  in passes without gradient: momentum networks, and networks that make targets of their own (CAE)
wide     besides, with gradient, layers with at least 1024 inputs and outputs: below, rounding costs more than it saves

Inputs and weights are rounded to e4m3, gradients of outputs to e5m2; the gradient of a weight is a product in bf16, as its
sum is over all tokens. Parameters stay what and where they are: a run goes on with or without it.

Not torchao's modules: they stand for plain nn.Linear, have no part of a weight as operand (`Projections`), and keep the
parameter for the backward pass, before which ZeRO-3 takes it away.

Sources: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433 (which format for what, one scale per tensor);
torchao's float8 training (scales from the tensor itself, fast accumulation forward alone; its recipe rowwise_with_gw_hp
keeps the gradient of the weight in high precision). Why 1024: TransformerEngine on an H200 made ViT-S 14 % slower and
ViT-L 17 % faster (galilai-group/stable-pretraining).
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple

import torch
from fastmim_kernels import bias_gelu
from torch import Tensor, nn

from fastmim.blocks import GeluLinear, Linear, Projections
from fastmim.compiling import blocks_of
from fastmim.config import ConfigError
from fastmim.methods.base import Method

Policy = Literal["off", "targets", "wide"]
WIDTH = 1024
# Of inputs and outputs; what torch._scaled_mm asks for.
MULTIPLE = 16
# The first GPUs that multiply 8-bit floats: Ada.
LEAST_CAPABILITY = (8, 9)
VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
# No tensor is scaled as if its largest number were smaller: the scale would leave float32.
TINY = 2.0**-100
EXPONENT_BITS = 0x7F800000


# ---- the product


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as 8-bit floats times one scale.

    The scale is a power of two, so that nothing but the cast rounds, and what it rounds to depends on the rest of the tensor
    only where numbers are too small for the format. The largest number comes to lie in the format's last octave but one. A
    number that is not finite makes all of the product NaN.

    Args:
        x: floats.
        dtype: one of the 8-bit formats.

    Returns:
        The values, in x's shape, and the scale, a scalar in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        largest = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32).clamp_min(TINY)
        octave = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
        scale = octave * 2.0 ** (1 - math.floor(math.log2(torch.finfo(dtype).max)))
        return (x / scale).to(dtype, memory_format=torch.contiguous_format), scale


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None = None, *, fast: bool
) -> Tensor:
    """(M, I), (O, I), (O,) in bf16 -> a b^T + bias, (M, O) in bf16.

    Args:
        a, b: 8-bit values in rows, with their scales.
        fast: whether sums may lose some of float32's bits on the way.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_scale, b_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast)
    # torch's own has no fast product for CPUs: 100 times slower than this one.
    with torch.autocast(a.device.type, enabled=False):
        out = (a.float() @ b.float().t()) * (a_scale * b_scale)
        return (out if bias is None else out + bias.float()).bfloat16()


class Product(torch.autograd.Function):
    """The parameter itself is not kept for the backward pass, in which it need not be there (ZeRO-3)."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor
    ) -> Tensor:
        return multiply(x8, x_scale, w8, w_scale, None if bias is None else bias.bfloat16(), fast=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, _, _, w8, w_scale = inputs
        ctx.save_for_backward(x, w8, w_scale)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("--fp8: expected a first derivative, got a request to differentiate it")
        x, w8, w_scale = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            g8, g_scale = rounded(grad, GRADIENTS)
            for_x = multiply(g8, g_scale, w8.t().contiguous(), w_scale, fast=False)
        if ctx.needs_input_grad[1]:
            for_weight = (grad.t() @ x).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return for_x, for_weight, for_bias, None, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` by 8-bit products.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None. I and O are multiples of 16.

    Returns:
        (..., O) in bf16. Differentiable.
    """
    rows = x.bfloat16().flatten(0, -2)
    out = Product.apply(rows, weight, bias, *rounded(rows.detach(), VALUES), *rounded(weight.detach(), VALUES))
    return out.view(*x.shape[:-1], len(weight))


# ---- the layers


class Passes:
    """Whether the method is in a training pass. What evaluation asks for is none, and is computed in bf16."""

    is_training = False

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any) -> Any:
            self.is_training = True
            try:
                return function(*args)
            finally:
                self.is_training = False

        return run


class Chosen(nn.Linear):
    """What `convert` adds to a layer."""

    takes_gradient: bool
    """Whether passes with gradient use 8 bits."""
    passes: Passes

    def is_low(self) -> bool:
        # A block that is computed again in the backward pass is outside of the method's forward, but has a gradient.
        return self.takes_gradient if torch.is_grad_enabled() else self.passes.is_training


class Float8Linear(Chosen, Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) if self.is_low() else super().forward(x)


class Float8GeluLinear(Chosen, GeluLinear):
    def forward(self, x: Tensor, *, is_active: bool = False) -> Tensor:
        if not self.is_low():
            return super().forward(x, is_active=is_active)
        return linear(x if is_active else bias_gelu(x), self.weight, self.bias)


class Float8Projections(Chosen, Projections):
    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if not self.is_low():
            return super().forward(x, queries)
        width, bias = x.shape[2], self.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if queries is None:
            return linear(x, self.weight, bias)
        return linear(queries, self.weight[:width], bias[:width]), linear(x, self.weight[width:], bias[width:])


KINDS: dict[type[nn.Linear], type[Chosen]] = {
    Linear: Float8Linear,
    GeluLinear: Float8GeluLinear,
    Projections: Float8Projections,
}


class Choice(NamedTuple):
    """Linear layers of a method. One may be in both lists."""

    with_gradient: list[nn.Linear]
    without: list[nn.Linear]
    left: Counter[str]
    """How many stay as they are, by reason."""


def choose(method: Method, policy: Policy, width: int = WIDTH) -> Choice:
    """Which linear layers compute in 8 bits.

    Args:
        width: least number of inputs and of outputs of a layer that has gradients.
    """
    inside = {part for block in blocks_of(method) for part in block.modules()}
    targets = {part for name in method.ungraded for part in method.get_submodule(name).modules()}
    choice = Choice([], [], Counter())
    for part in method.modules():
        if not isinstance(part, nn.Linear) or policy == "off":
            continue
        is_frozen = not part.weight.requires_grad
        least = min(part.in_features, part.out_features)
        has_gradient, has_none = policy == "wide" and not is_frozen and least >= width, is_frozen or part in targets
        if part not in inside or type(part) not in KINDS:
            choice.left["outside of blocks"] += 1
        elif part.in_features % MULTIPLE or part.out_features % MULTIPLE:
            choice.left[f"with sides that {MULTIPLE} does not divide"] += 1
        else:
            if has_gradient:
                choice.with_gradient.append(part)
            if has_none:
                choice.without.append(part)
            if not has_gradient and not has_none:
                choice.left[f"narrower than {width}" if policy == "wide" else "with gradients alone"] += 1
    return choice


def check(method: Method, policy: Policy, device: torch.device, precision: str, width: int = WIDTH) -> list[str]:
    """Whether a run can have it; lines that tell what becomes of its layers.

    Args:
        method: of the run, or one like it without values.

    Raises:
        ConfigError: the precision, the GPU or the method's layers stand against it.
    """
    if policy == "off":
        return []
    if precision != "bf16":
        raise ConfigError(
            f"--fp8 {policy}: expected --precision bf16 for all else, got {precision}; give it, or --fp8 off"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.cuda is None or capability < LEAST_CAPABILITY:
            got = f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, capability))}"
            least = ".".join(map(str, LEAST_CAPABILITY))
            raise ConfigError(
                f"--fp8 {policy}: expected an NVIDIA GPU of compute capability {least}, got {got}; use --fp8 off"
            )
    choice = choose(method, policy, width)
    left = ", ".join(f"{count} {reason}" for reason, count in choice.left.items())
    if not choice.with_gradient and not choice.without:
        raise ConfigError(f"--fp8 {policy}: expected linear layers that it is for, got {left or 'none'}; use --fp8 off")
    lines = [
        f"fp8       {len(choice.with_gradient)} linear layers in passes with gradient, {len(choice.without)} in passes "
        f"without; in bf16 stay {left or 'none'}"
    ]
    if device.type != "cuda":
        lines.append("fp8       emulated: numbers are those of a GPU, but this device is slower with it than without")
    return lines


def convert(method: Method, policy: Policy, width: int = WIDTH) -> None:
    """Lets a method's layers compute in 8 bits. Modules and parameters keep their names."""
    choice = choose(method, policy, width)
    passes = Passes()
    for part in {*choice.with_gradient, *choice.without}:
        part.__class__ = KINDS[type(part)]
        part.takes_gradient, part.passes = part in choice.with_gradient, passes
    if policy != "off":
        method.forward, method.represent = passes.within(method.forward), passes.within(method.represent)
