"""The sizes at which ops meet in a training step: what gpu_kernels.py and the short run of bench_kernels.py time."""

import importlib

import torch
from fastmim_kernels import cases

BF16 = torch.bfloat16


def spec(op: str):
    return importlib.import_module(f"fastmim_kernels.{op}.spec")


def training_sizes(n: int) -> dict[str, tuple[cases.Case, ...]]:
    """Op -> cases of a step with n images of 224 pixels, ViT-B, mask ratio 0.75, unless said otherwise.

    Args:
        n: a multiple of 8. The images of ops that need more memory or time than the others are fewer.
    """
    images, window, few = (n, 3, 256, 256), (224, 224), n // 4
    stream = "residual bias prenorm"
    widths = (384, 512, 768, 1024, 1280) if n >= 256 else (768,)
    blocks = 12 if n >= 256 else 1
    return {
        "masks": (spec("masks").random_case(n, 196, 49), spec("masks").cell_case(n, (14, 14), 2, 17)),
        "patches": (spec("patches").case(images, 16, window, keep=49, dtype=BF16),),
        "gather": (spec("gather").case(n, 196, 49, 768, BF16),),
        "restore": (
            spec("restore").case(n, 196, 49, 512, dtype=BF16, parameters=BF16),
            spec("restore").case(n, 196, 49, 512, dtype=BF16),
        ),
        "pixel_loss": (spec("pixel_loss").case(images, 16, 147, window, dtype=BF16),),
        "infonce": tuple(spec("infonce").case(m, m, 256, dtype=BF16) for m in (4 * n, 16 * n)),
        "layer_norm": (
            *(spec("layer_norm").case((n, 197, d), stream, BF16, BF16) for d in widths),
            spec("layer_norm").case((n, 197, 768), "residual bias scale rows prenorm", BF16, BF16),
        ),
        "activation": (spec("activation").case((n, 50, 3072), True, BF16),),
        "topk": tuple(spec("topk").case(n // 8, 12, 196, k, 64, dtype=BF16) for k in (49, 98)),
        "mixing": (
            spec("mixing").mix_case((n, 3, 224, 224), 16, 4, dtype=BF16),
            spec("mixing").unmix_case(few, 196, 4, 512, dtype=BF16),
        ),
        "patch_contrast": (spec("patch_contrast").case(few, 196, 768, 4, dtype=BF16),),
        "token_loss": (spec("token_loss").case(49 * n, 768, 8192, dtype=BF16),),
        "views": (spec("views").case((few, 3, 256, 256), window, spec("views").ALL, BF16),),
        "ema": (spec("ema").case(f"ViT-B_{blocks}_blocks", blocks * spec("ema").BLOCK, 0.996),),
        "adamw": (
            spec("adamw").case(f"ViT-B_{blocks}_blocks", blocks * spec("ema").BLOCK),
            spec("adamw").case(f"ViT-B_{blocks}_blocks_bf16", blocks * spec("ema").BLOCK, grad=BF16, copy=BF16),
        ),
        "resize": (spec("resize").case((few, 3, 320, 320), window, is_normalized=True, dtype=BF16),),
    }  # fmt: skip


def short_sizes() -> dict[str, tuple[cases.Case, ...]]:
    """A step of 8 images, and the ops that have no Triton kernel: seconds on a CPU."""
    return training_sizes(8) | {
        "dense": (spec("dense").case((8, 50), 768, 3072),),
        "qkv": (spec("qkv").case(8, 50, 12, 64), spec("qkv").case(8, 197, 16, 32)),
        "depthwise": (spec("depthwise").case(4, (14, 14), 68, 4, 256, dtype=BF16),),
        "block_masks": (spec("block_masks").case(64, (14, 14), 98),),
        "philox": (spec("philox").case("uniform", 64, 196, 4),),
    }
