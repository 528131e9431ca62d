"""Activation checkpointing: what a block does not keep for the backward pass, but computes again.

none     everything is kept
mlp      the inputs of the MLPs' second layers are not: GELU gives them again, which costs no product; bfloat16 on a CPU that
         multiplies it is computed so under any policy
blocks   the inputs of the blocks are kept alone; the rest costs a second forward pass

The gradients are bit for bit the same: nothing in a block is random.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from fastmim_kernels import bias_gelu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "mlp", "blocks"]


class Recomputed(nn.Module):
    """A block that follows a policy."""

    checkpointing: Checkpointing = "none"

    def project(self, x: Tensor, layer: nn.Module) -> Tensor:
        """The layer behind GELU, a `GeluLinear`, of x."""
        if self.checkpointing != "mlp" or not torch.is_grad_enabled():
            return layer(x)
        if torch.compiler.is_compiling():
            # Its graph recomputes what the gradient needs: not the product.
            return _again(layer, x)
        active, source = bias_gelu(x), x.detach()
        key = _storage(active)

        # Hooks instead of `checkpoint`, which would compute the layer's product again, and outside of its module.
        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if _storage(saved) == key else saved

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else bias_gelu(source).view(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return layer(active, is_active=True)


def set_checkpointing(network: nn.Module, policy: Checkpointing) -> None:
    """Sets the policy of all blocks of a network."""
    for part in network.modules():
        if isinstance(part, Recomputed):
            part.checkpointing = policy


def called(block: Recomputed, *args: Any) -> Any:
    """block(*args), as its policy says. The call goes through the module, so that ZeRO-3 gathers its parameters again."""
    return _again(block, *args) if block.checkpointing == "blocks" and torch.is_grad_enabled() else block(*args)


def _again(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
