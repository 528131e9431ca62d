"""Transformer blocks: linear layers, attention, norms, the pre-norm block, stochastic depth.

A parameter is only used inside the forward of the module that owns it: there ZeRO-3 gathers it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from fastmim_kernels import Stream, add_layer_norm, gather_tokens, gelu_linear, linear, uniform
from fastmim_kernels.qkv import attention
from torch import Tensor, nn

from fastmim.attention import Biased, attend_packed, attend_tokens, takes_packed
from fastmim.recompute import Recomputed, called

NORM_EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A linear layer whose weight gradient is summed in float32 on CPUs, too."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """The second layer of an MLP, with the GELU before it."""

    def forward(self, x: Tensor, *, is_active: bool = False) -> Tensor:
        """(..., I) -> (..., O). is_active: x is what GELU gave."""
        return (linear if is_active else gelu_linear)(x, self.weight, self.bias)


class Projections(nn.Linear):
    """Queries, keys and values by one product.

    Args:
        key_bias: False leaves the keys without one, which softmax cancels. Source: microsoft/unilm beit.
    """

    def __init__(self, width: int, *, key_bias: bool = True):
        super().__init__(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D) -> (B, N, 3 D); with queries (B, M, D): theirs, (B, M, D), and keys and values of x, (B, N, 2 D)."""
        bias = self.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if queries is None:
            return linear(x, self.weight, bias)
        width = x.shape[2]
        return linear(queries, self.weight[:width], bias[:width]), linear(x, self.weight[width:], bias[width:])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = Projections(width, key_bias=key_bias)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor | None,
        attend: Attend = attention,
        rows: Tensor | None = None,
        qkv: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens to all tokens of their image.

        Args:
            x: (B, N, D) tokens; None if there is qkv.
            attend: the attention.
            rows: (B, M) the tokens whose results are wanted, each once; None: all.
            qkv: (B, N, 3 D) what `self.qkv` would give.

        Returns:
            (B, N, D), or (B, M, D).
        """
        given = x if qkv is None else qkv
        if rows is None or attend is not attention or takes_packed(given):
            # Also for some rows: a function may know its queries by their places, and the kernel for all of them is
            # faster than plain torch for a part.
            qkv = self._split(self.qkv(x) if qkv is None else qkv, 3)
            if isinstance(attend, Biased):
                out = attend_packed(qkv, attend.bias)
            else:
                out = attend_packed(qkv) if attend is attention else _by_head(attend, *qkv.unbind(2))
            return self.proj(out.flatten(2) if rows is None else gather_tokens(out.flatten(2), rows))
        if qkv is None:
            queries, others = self.qkv(x, gather_tokens(x, rows))
        else:
            width = qkv.shape[2] // 3
            queries, others = gather_tokens(qkv[..., :width], rows), qkv[..., width:]
        out = attend_tokens(self._split(queries, 1).squeeze(2), *self._split(others, 2).unbind(2))
        return self.proj(out.flatten(2))

    def _split(self, x: Tensor, parts: int) -> Tensor:
        return x.unflatten(2, (parts, self.heads, x.shape[2] // (parts * self.heads)))


def _by_head(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tokens (B, N, heads, d) by a function of (B, heads, N, d)."""
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Branch(NamedTuple):
    """What is still to be added to the residual stream: x (B, N, D), times scale (D,) and rows (B,) where they are given."""

    x: Tensor
    scale: Tensor | None = None
    rows: Tensor | None = None

    def added_to(self, stream: Tensor) -> Tensor:
        x = self.x if self.scale is None else self.x * self.scale
        return stream + (x if self.rows is None else x * self.rows.to(x.dtype).view(-1, 1, 1))


class Norm(nn.LayerNorm):
    """LayerNorm behind a residual addition: both in one pass over the tokens."""

    def __init__(self, width: int, eps: float = NORM_EPS):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor, branch: Branch | None = None) -> tuple[Tensor, Tensor]:
        """Adds a branch to the residual stream x (B, N, D) and normalizes: the normalized sum, and the sum."""
        if branch is None:
            return add_layer_norm(x, None, self.weight, self.bias, eps=self.eps), x
        return add_layer_norm(
            branch.x, x, self.weight, self.bias, scale=branch.scale, row_scale=branch.rows, eps=self.eps, prenorm=True
        )


class Sum(nn.Module):
    """A `Norm` that does not normalize."""

    def forward(self, x: Tensor, branch: Branch | None = None) -> tuple[Tensor, Tensor]:
        x = x if branch is None else branch.added_to(x)
        return x, x


class Residual(Recomputed):
    """What blocks end with: an MLP of ratio 4, and the learned factors of both branches."""

    def add_mlp(self, width: int, layer_scale: float) -> None:
        """Called last when a block is built: weights are drawn in the order of their modules."""
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = GeluLinear(4 * width, width)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((width,), float(layer_scale))) if layer_scale else None
            self.register_parameter(name, gamma)


class Block(Residual):
    """Pre-norm transformer block with an MLP of ratio 4 and exact GELU.

    Args:
        layer_scale: start of the learned factors of both branches, one per channel; 0: none.
        key_bias: see `Projections`.
    """

    def __init__(self, width: int, heads: int, *, layer_scale: float = 0.0, key_bias: bool = True):
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads, key_bias=key_bias)
        self.norm2 = Norm(width)
        self.add_mlp(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        attend: Attend = attention,
        drop: Tensor | None = None,
        rows: Tensor | None = None,
        qkv: Tensor | None = None,
    ) -> tuple[Tensor, Branch]:
        """One block, its last addition left to who comes next: the next block's first norm adds and normalizes at once.

        Args:
            x: (B, N, D) residual stream.
            branch: what the block before left to be added, or None.
            attend: the attention.
            drop: (B, 2) factors of the two branches, 0 where stochastic depth leaves one out.
            rows: (B, M) the tokens that go on, each once; None: all. The others serve as keys and values alone.
            qkv: (B, N, 3 D) projections of the normalized stream, if they are known; then there is no branch.

        Returns:
            The stream, and what is to be added to it.
        """
        y = None
        if qkv is None:
            y, x = self.norm1(x, branch)
        mixed = self.attn(y, attend, rows, qkv)
        if rows is not None:
            x = gather_tokens(x, rows)
        attended, last = (None, None) if drop is None else drop.unbind(1)
        y, x = self.norm2(x, Branch(mixed, self.gamma_1, attended))
        # What leaves the module must not be its parameter: ZeRO-3 takes that away.
        scale = None if self.gamma_2 is None else self.gamma_2.clone()
        return x, Branch(self.project(self.fc1(y), self.fc2), scale, last)


def run_blocks(
    blocks: Iterable[Block],
    x: Tensor,
    attend: Attend | Sequence[Attend] = attention,
    drop: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    qkv: Tensor | None = None,
) -> tuple[Tensor, Branch]:
    """Runs at least one block after another.

    Under autocast to bf16 the residual stream is bf16, too; sums and norms are computed in fp32.

    Args:
        blocks: of width D.
        x: (B, N, D).
        attend: the attention of all blocks, or one per block.
        drop: (B, depth, 2), see `random_drop_path`.
        rows: (B, M) the tokens that leave the last block, see `Block`.
        qkv: (B, N, 3 D) projections in the first block, see `Block`.

    Returns:
        The residual stream, and the last branch, which is still to be added to it.
    """
    blocks, x, branch = list(blocks), in_stream_dtype(x), None
    for i, block in enumerate(blocks):
        is_last = i == len(blocks) - 1
        x, branch = called(
            block,
            x,
            branch,
            attend if callable(attend) else attend[i],
            None if drop is None else drop[:, i],
            rows if is_last else None,
            qkv if i == 0 else None,
        )
    return x, branch


def in_stream_dtype(x: Tensor) -> Tensor:
    """x in the dtype of the residual stream."""
    device = x.device.type
    is_low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return x.bfloat16() if is_low else x


def random_drop_path(rng: Tensor, ids: Tensor, peak: float, *depths: int) -> list[Tensor]:
    """Stochastic depth: factors (B, depth, 2) of the branches of the blocks, for networks of the given depths.

    In each network the drop rate rises linearly from 0 at its first block to `peak` at its last. A branch survives
    with probability 1 - rate, and is then divided by it. Source: arXiv 1603.09382; timm's scaling.
    """
    rate = torch.cat([torch.linspace(0, peak, depth, device=ids.device) for depth in depths]).repeat_interleave(2)
    survives = uniform(rng, ids, Stream.DROP_PATH, len(rate)) >= rate
    # Factors of one branch lie side by side: kernels take them without a copy.
    factors = (survives / (1 - rate)).T.contiguous().view(-1, 2, len(ids)).permute(2, 0, 1)
    return list(factors.split(list(depths), dim=1))
