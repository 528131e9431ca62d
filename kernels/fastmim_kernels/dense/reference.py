"""torch's own linear map: what it is. On GPUs it needs no help."""

from torch import Tensor
from torch.nn.functional import gelu, linear

__all__ = ["gelu_linear", "linear"]


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the public function."""
    return linear(gelu(x), weight, bias)
