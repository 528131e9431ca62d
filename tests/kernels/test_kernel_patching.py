"""Replacements in models of other libraries' make: same results and gradients, and no trace after."""

import copy
import functools
import pickle
import threading
import types

import pytest
import torch
from fastmim_kernels import nn as fnn
from fastmim_kernels import patch
from fastmim_kernels.recognition import round_to_count
from parity import PARTS, assert_parity, images
from torch import Tensor, nn


class Scale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.5).div_(0.5)


class Mlp(nn.Module):
    """The parts of timm's."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, 3 * width), activation, nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(3 * width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """The parts of timm's."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = fnn.Attention(width, 2), Mlp(width, activation)
        self.ls1, self.drop_path1 = Scale(width), DropPath()
        self.ls2, self.drop_path2 = Scale(width), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, activation: nn.Module | None = None, width: int = 12):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.blocks = nn.Sequential(*(Block(width, activation or nn.GELU()) for _ in range(2)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.proj(x).flatten(2).transpose(1, 2)))


class MaskedAutoencoder(nn.Module):
    """The loss of facebookresearch/mae, method and attributes."""

    norm_pix_loss = True

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size = (4, 4)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        target = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return ((((pred - target) ** 2).mean(-1)) * mask).sum() / mask.sum()


@pytest.mark.parametrize("training", [False, True])
def test_vit_has_the_same_results_gradients_and_draws(training):
    torch.manual_seed(0)
    report = assert_parity(ViT().train(training), images(), parts=PARTS)
    assert not report.skipped
    assert len(report.replaced) == 1 + 2 * (1 + 1 + 2) + 1
    assert "block          2 replaced (blocks.0 ...)" in str(report)


def test_dry_run_only_reports():
    model = ViT()
    report = patch.apply(model, dry_run=True)
    assert {entry.part for entry in report.replaced} == PARTS
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_parts_can_be_switched_off():
    report = patch.apply(ViT(), mlp=False, block=False, patch_embed=False)
    assert {entry.part for entry in report.entries} == {"layer_norm"}


def test_applying_twice_reports_and_removing_twice_does_nothing():
    model = ViT()
    first = patch.apply(model)
    assert {entry.reason for entry in patch.apply(model).entries} == {"is replaced already"}
    assert patch.remove(model) == len(first.replaced)
    assert patch.remove(model) == 0


def test_exceptions_in_the_context_remove_the_replacements():
    model = ViT()
    with pytest.raises(KeyError), patch.apply(model):
        raise KeyError
    assert patch.remove(model) == 0


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(approximate="tanh")])
def test_other_activations_are_left_alone(activation):
    torch.manual_seed(0)
    report = assert_parity(ViT(activation).eval(), images(), parts=PARTS - {"mlp"})
    assert [entry.part for entry in report.skipped] == ["mlp"] * 2
    assert "computes something else" in report.skipped[0].reason


def test_modules_of_unknown_kinds_are_left_alone_with_the_reason():
    class Own(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "own": Own(4),
            "plain": nn.LayerNorm(4, elementwise_affine=False),
            "two": nn.LayerNorm((3, 4)),
            "oblong": nn.Conv2d(3, 4, kernel_size=(2, 4), stride=(2, 4)),
            "overlap": nn.Conv2d(3, 4, kernel_size=3, stride=2),
        }
    )
    reasons = {entry.path: entry.reason for entry in patch.apply(model).entries}
    assert reasons == {
        "own": "Own has a forward of its own",
        "plain": "it has no weight",
        "two": "it normalizes over several dimensions",
        "oblong": "its patches are not square, or it pads, dilates or groups",
    }


def test_hooks_that_would_be_bypassed_prevent_the_replacement():
    model = ViT().eval()
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.append("fc1"))
    model.blocks[1].norm2.register_forward_hook(lambda *args: seen.append("norm2"))
    report = patch.apply(model)
    assert {(entry.path, entry.part) for entry in report.skipped} == {("blocks.0.mlp", "mlp"), ("blocks.1", "block")}
    seen.clear()
    model(images())
    assert seen == ["fc1", "norm2"]


def test_hooks_see_nothing_of_the_comparison_and_need_not_be_copied():
    model, seen, lock = ViT(), [], threading.Lock()
    for block in model.blocks:
        block.attn.register_forward_hook(functools.partial(lambda lock, *_: seen.append("attn"), lock))
    assert len(patch.apply(model).replaced) == 10
    assert not seen
    model(images())
    assert seen == ["attn", "attn"]


def test_modules_that_cannot_be_copied_are_left_alone():
    model = ViT()
    model.blocks[0].mlp.lock = threading.Lock()
    skipped = {entry.path: entry.reason for entry in patch.apply(model).skipped}
    assert set(skipped) == {"blocks.0", "blocks.0.mlp"} and all(
        "cannot pickle" in reason for reason in skipped.values()
    )


def test_replicas_of_data_parallel_use_their_own_weights():
    """As nn.DataParallel makes them: a shallow copy per device, whose parameters are replaced by others."""
    torch.manual_seed(0)
    layer, x = nn.LayerNorm(6), torch.randn(2, 6)
    attributes = set(vars(layer))
    with patch.apply(layer):
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.full((6,), 2.0), torch.zeros(6)
        assert torch.allclose(replica(x), 2 * layer(x), atol=1e-6)
    assert set(vars(layer)) == attributes


def test_a_method_of_the_class_left_in_the_instance_is_no_obstacle():
    """Libraries that record outputs put a method in place of another for a while, and then the first one back."""
    model = ViT().eval()
    before = model(images())
    for module in model.modules():
        module.forward = module.forward
    report = patch.apply(model)
    assert len(report.replaced) == 10 and not report.skipped
    assert torch.allclose(model(images()), before, atol=1e-5)


def test_hooks_and_layers_that_come_later_are_called():
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model, seen = ViT().eval(), []
    patch.apply(model)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.append("fc1"))
    model.blocks[1].norm2.register_forward_hook(lambda *args: seen.append("norm2"))
    model(images())
    assert seen == ["fc1", "norm2"]
    adapted = Adapted(12, 36)
    adapted.load_state_dict(model.blocks[1].mlp.fc1.state_dict())
    model.blocks[1].mlp.fc1 = adapted
    out = model(images())
    patch.remove(model)
    assert torch.allclose(model(images()), out, atol=1e-5)


def test_method_replaced_by_somebody_else_is_kept():
    model = ViT()
    theirs = model.norm.forward = lambda x: x * 2
    report = patch.apply(model)
    assert [entry.reason for entry in report.skipped] == ["its forward was replaced by somebody else"]
    patch.remove(model)
    assert model.norm.forward is theirs


def test_meta_models_are_left_alone():
    with torch.device("meta"):
        model = ViT()
    assert all("elsewhere" in entry.reason for entry in patch.apply(model).entries)


def test_copies_of_a_patched_model_are_patched_and_independent():
    model = ViT().eval()
    plain = model(images())
    patch.apply(model)
    other = copy.deepcopy(model)
    assert patch.remove(model)
    with torch.no_grad():
        other.norm.bias.add_(1)
    assert torch.equal(model(images()), plain)
    assert torch.allclose(other(images()), plain + 1, atol=1e-5)
    assert patch.remove(other)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(("build", "shape"), [(ViT, (2, 3, 12, 12)), (encoder, (2, 5, 8))], ids=["vit", "encoder"])
def test_pickled_models_come_back_without_replacements_and_take_them_anew(build, shape):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    before = model(x)
    patch.apply(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), before)
    assert len(patch.apply(loaded).replaced) == patch.remove(loaded) == patch.remove(model)
    assert torch.equal(loaded(x), before) and not any("forward" in m.__dict__ for m in loaded.modules())


def test_sizes_that_the_patches_do_not_divide_run_as_before():
    conv = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    x = images(side=14)
    before = conv(x)
    with patch.apply(conv):
        assert torch.equal(conv(x), before)


def test_patched_model_compiles_to_one_graph():
    torch._dynamo.reset()
    model = ViT().eval()
    before = model(images())
    with patch.apply(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images()), before, atol=1e-5)


def test_bfloat16_model_stays_close():
    model = ViT().eval().bfloat16()
    before = model(images().bfloat16())
    with patch.apply(model) as report:
        assert {entry.part for entry in report.replaced} == PARTS
        assert torch.allclose(model(images().bfloat16()), before, atol=0.1)


class RandDropPath(nn.Module):
    """As in transformers: the draws depend on the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        keep = 0.5 + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
        return x * keep.floor() / 0.5 if self.training else x


def test_stochastic_depth_under_autocast_leaves_out_the_same_branches():
    torch.manual_seed(0)
    model, x = ViT().train(), images(batch=32)
    for block in model.blocks:
        block.drop_path1, block.mlp.drop1, block.mlp.drop2 = RandDropPath(), nn.Identity(), nn.Identity()

    def run() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    before = run()
    with patch.apply(model) as report:
        assert {entry.part for entry in report.replaced} == PARTS
        assert torch.allclose(run(), before, atol=0.2)


def test_loss_of_a_masked_autoencoder():
    model = MaskedAutoencoder()
    g = torch.Generator().manual_seed(3)
    x, pred = images(), torch.randn((2, 9, 48), generator=g, requires_grad=True)
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 1, 0]])
    before = model.forward_loss(x, pred, mask)
    gradient = torch.autograd.grad(before, pred)[0]
    with patch.apply(model) as report:
        assert [entry.part for entry in report.replaced] == ["loss"]
        loss = model.forward_loss(x, pred, mask)
        assert torch.allclose(loss, before, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(loss, pred)[0], gradient, atol=1e-7)
        # Unequal numbers of masked patches have no common shape: never a wrong number.
        mask[0, 0] = 0
        assert model.forward_loss(x, pred, mask).isnan()


def test_the_number_of_masked_patches_is_not_guessed_on_other_devices():
    """facebookresearch/mae's ratio is an argument of forward: only the mask tells. transformers' is in the configuration."""
    mask = torch.empty(2, 10, device="meta")
    with pytest.raises(RuntimeError, match="meta"):  # it was read
        round_to_count(MaskedAutoencoder(), MaskedAutoencoder(), mask)
    config = types.SimpleNamespace(mask_ratio=0.6)
    assert round_to_count(MaskedAutoencoder(), config, mask) == 6
    assert round_to_count(MaskedAutoencoder(), config, torch.tensor([[1.0, 1, 0, 0]])) == 2


def test_parts_are_found_whatever_the_default_device_is():
    model = ViT()
    with torch.device("meta"), patch.apply(model) as report:
        found = {entry.part for entry in report.replaced}
    assert found >= {"layer_norm", "mlp", "block"}


def test_transformer_encoder_of_torch():
    torch.manual_seed(0)
    for norm_first in (False, True):
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
        )
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert_parity(model.train(), torch.randn(2, 5, 8), parts={"layer_norm", "mlp"})
