"""A model while it is patched against itself before and after: what the tests of patching share."""

import torch
from fastmim_kernels import patch
from torch import Tensor, nn

PARTS = {"layer_norm", "mlp", "patch_embed", "block"}


def images(batch: int = 2, side: int = 12) -> Tensor:
    return torch.randn((batch, 3, side, side), generator=torch.Generator().manual_seed(1))


def result_and_gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    out = model(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
    return [out.detach(), torch.rand(1), *(g for g in gradients if g is not None)]


def assert_parity(model: nn.Module, *inputs: Tensor, parts: set[str]) -> patch.Report:
    """Same results and gradients while replaced, same bits afterwards."""
    before = result_and_gradients(model, *inputs)
    keys, attributes = list(model.state_dict()), [set(m.__dict__) for m in model.modules()]
    with patch.apply(model) as report:
        assert {entry.part for entry in report.replaced} == parts, str(report)
        assert list(model.state_dict()) == keys
        for a, b in zip(result_and_gradients(model, *inputs), before, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert all(torch.equal(a, b) for a, b in zip(result_and_gradients(model, *inputs), before, strict=True))
    return report
