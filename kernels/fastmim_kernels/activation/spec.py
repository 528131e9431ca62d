"""Cases of the activation: with and without bias, odd widths, far tails, low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype = torch.float32) -> Case:
    count = torch.Size(shape).numel()

    def make(device: torch.device) -> Inputs:
        g = generator(13)
        x = 4 * torch.randn(shape, generator=g)
        if x.numel() > 8:  # tails, where one minus the other side would cancel
            x.view(-1)[:8] = torch.tensor([-40.0, -12.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 40.0])
        bias = torch.randn(shape[-1:], generator=g) if with_bias else None
        return {"x": x.to(device, dtype), "bias": None if bias is None else bias.to(device)}

    name = f"{'x'.join(map(str, shape))}{'_bias' * with_bias}_{str(dtype)[6:]}"
    # A gradient of the bias adds up rounded terms.
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 2e-6)
    grads = ("x", "bias") if with_bias else ("x",)
    return Case(name, "bias_gelu", make, tolerance, grads, bytes_moved=2 * count * dtype.itemsize, flops=20 * count)


CASES = (
    case((3, 5, 37), False),
    case((4, 33), True),
    case((0, 7), True),
    case((3, 5, 37), False, torch.bfloat16),
    case((4, 33), True, torch.float16),
)
BENCH = (case((64, 50, 3072), False, torch.bfloat16), case((64, 50, 3072), True, torch.bfloat16))
