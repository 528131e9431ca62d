"""Cases of top-K attention: one key to all keys, no or several prefix tokens, odd heads, strided and low precision."""

import torch

from ..cases import Case, Inputs, generator


def case(
    batch: int,
    heads: int,
    patches: int,
    topk: int,
    width: int,
    prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    scale: float | None = None,
    is_counted: bool = False,
    is_coarse: bool = False,
) -> Case:
    """is_coarse: scores that float32 holds exactly. Among many queries, some have two keys whose scores are so close that
    rounding decides between them."""
    length = prefix + patches

    def make(device: torch.device) -> Inputs:
        g = generator(10)
        # As a fused projection gives them: views into (B, N, 3, H, d).
        qkv = torch.randn((batch, length, 3, heads, width), generator=g).to(device, dtype)
        if is_coarse:
            qkv = (4 * qkv).round() / 4
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        labels = torch.randint(0, 4, (batch, patches), generator=g).to(device) if is_counted else None
        return {"q": q, "k": k, "v": v, "topk": topk, "num_prefix": prefix, "scale": scale, "labels": labels}

    name = f"B{batch}_H{heads}_L{patches}_K{topk}_P{prefix}_d{width}_{str(dtype)[6:]}"
    name += f"_scale{scale}" * (scale is not None) + "_counted" * is_counted + "_coarse" * is_coarse
    # bfloat16: weights and results are rounded; a gradient sums N products of such.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    moved = 4 * batch * heads * length * width * dtype.itemsize
    grads = () if is_counted else ("q", "k", "v")
    flops = 4 * batch * heads * length * length * width
    return Case(name, "topk_attention", make, tolerance, grads, bytes_moved=moved, flops=flops)


CASES = (
    case(2, 3, 196, 49, 64),
    case(2, 3, 196, 49, 64, is_counted=True),
    case(1, 2, 49, 12, 33, prefix=3, scale=0.3),
    case(2, 2, 49, 49, 16, prefix=0),
    case(2, 3, 16, 1, 20),
    case(2, 1, 49, 12, 64, dtype=torch.bfloat16),
    case(2, 1, 49, 12, 64, dtype=torch.bfloat16, is_counted=True),
    case(1, 1, 1, 1, 8),
    case(0, 2, 9, 3, 8),
)
BENCH = (
    case(16, 12, 196, 49, 64),
    case(16, 12, 196, 49, 64, dtype=torch.bfloat16),
    case(16, 12, 196, 49, 64, dtype=torch.bfloat16, is_counted=True),
    case(16, 12, 196, 98, 64, dtype=torch.bfloat16),
)
