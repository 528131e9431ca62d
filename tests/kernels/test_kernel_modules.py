"""Drop-in modules against torch's own computation, and the functions with torch's signatures."""

import copy
import pickle
import subprocess
import sys

import fastmim_kernels
import pytest
import torch
import torch.nn.functional as F
from fastmim_kernels import functional
from fastmim_kernels import nn as fnn
from parity import images
from torch import nn


def test_layer_norm_and_add_layer_norm_modules():
    torch.manual_seed(0)
    theirs, ours, both = nn.LayerNorm(10), fnn.LayerNorm(10), fnn.AddLayerNorm(10)
    nn.init.normal_(theirs.weight)
    for module in (ours, both):
        module.load_state_dict(theirs.state_dict())
    x, stream = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(fnn.LayerNorm((3, 10))(x), nn.LayerNorm((3, 10))(x))
    y, h = both(x, stream)
    assert torch.equal(h, x + stream) and torch.allclose(y, theirs(x + stream), atol=1e-6)


def test_mlp_module():
    torch.manual_seed(0)
    ours, theirs = fnn.Mlp(6, 14, 5), nn.Sequential(nn.Linear(6, 14), nn.GELU(), nn.Linear(14, 5))
    renamed = {"fc1": theirs[0], "fc2": theirs[2]}
    ours.load_state_dict({f"{n}.{k}": v for n, m in renamed.items() for k, v in m.state_dict().items()})
    x = torch.randn(3, 6)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert set(dict(fnn.Mlp(4, norm_layer=nn.LayerNorm).named_parameters())) > {"norm.weight", "norm.bias"}


def test_attention_module():
    torch.manual_seed(0)
    module = fnn.Attention(12, 3, qkv_bias=True, qk_norm=True)
    assert {"qkv.weight", "qkv.bias", "q_norm.weight", "proj.weight"} <= set(module.state_dict())
    plain, sparse = fnn.Attention(12, 3), fnn.Attention(12, 3, topk=4, num_prefix=1)
    sparse.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 12)
    q, k, v = plain.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = plain.proj(((q @ k.mT) / 2).softmax(-1).matmul(v).transpose(1, 2).reshape(2, 5, 12))
    assert torch.allclose(plain(x), expected, atol=1e-6)
    # All 4 patches are kept: plain attention.
    assert torch.allclose(sparse(x), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"dim: expected a multiple of num_heads = 5, got 12"):
        fnn.Attention(12, 5)


def test_patch_embed_module_embeds_all_or_chosen_patches():
    torch.manual_seed(0)
    module = fnn.PatchEmbed(12, 4, 3, 7)
    x = images()
    expected = F.conv2d(x, module.proj.weight, module.proj.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(module(x), expected, atol=1e-5)
    ids = torch.tensor([[3, 0], [8, 1]])
    assert torch.allclose(module(x, ids), expected[torch.arange(2)[:, None], ids], atol=1e-5)
    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    scaled = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(module(pixels, mean=mean, std=std), module(scaled), atol=1e-5)
    with pytest.raises(ValueError, match=r"x: expected images of \(12, 12\) pixels, got \(8, 12\)"):
        module(x[:, :, :8])
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_functional_has_every_op_and_the_signatures_of_torch():
    names = {name for name in fastmim_kernels.__all__ if name[0].islower()} - {"backends", "chosen", "states"}
    assert names <= set(functional.__all__)
    assert all(getattr(functional, name) is getattr(fastmim_kernels, name) for name in names)
    x, weight, bias = torch.randn(3, 4, 10), torch.rand(10), torch.rand(10)
    for arguments in (((10,),), ((10,), weight), ((10,), weight, bias, 1e-3), ((4, 10),)):
        torch.testing.assert_close(functional.layer_norm(x, *arguments), F.layer_norm(x, *arguments))
    for approximate in ("none", "tanh"):
        torch.testing.assert_close(functional.gelu(x, approximate=approximate), F.gelu(x, approximate=approximate))


def test_layer_norm_takes_what_torchs_takes():
    for shape, size in (((2, 0), 0), ((6,), 6), ((0, 6), 6), ((2, 3, 6), (3, 6))):
        x = torch.randn(shape)
        torch.testing.assert_close(fnn.LayerNorm(size)(input=x), nn.LayerNorm(size)(x))


@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.GELU(approximate="tanh")], ids=["relu", "tanh"])
def test_mlp_runs_other_activations_as_they_are(act):
    module, x = fnn.Mlp(6, 10, act_layer=act, bias=(False, True), drop=(0.0, 0.0)), torch.randn(2, 6)
    assert module.fc1.bias is None and module.fc2.bias is not None
    assert torch.equal(module(x), module.fc2(act()(module.fc1(x))))


def test_layers_with_hooks_and_layers_put_in_their_place_are_called():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    mlp, embed, x = fnn.Mlp(6, 10), fnn.PatchEmbed(12, 4, 3, 7), torch.randn(2, 6)
    before, seen = mlp(x), []
    hooks = [m.register_forward_hook(lambda m, *_: seen.append(type(m))) for m in (mlp.fc1, mlp.act, embed.proj)]
    expected = embed(images())
    assert torch.allclose(mlp(x), before, atol=1e-6) and seen == [nn.Conv2d, nn.Linear, nn.GELU]
    with pytest.raises(ValueError, match=r"ids, window: expected neither for oblong patches or a proj with hooks"):
        embed(images(), torch.tensor([[0], [1]]))
    for hook in hooks:
        hook.remove()
    assert torch.allclose(embed(images()), expected, atol=1e-5)
    adapted = Adapted(6, 10)
    adapted.load_state_dict(mlp.fc1.state_dict())
    mlp.fc1 = adapted
    assert torch.allclose(mlp(x), mlp.fc2(F.gelu(adapted(x))), atol=1e-6)


def test_attention_takes_masks_gates_and_widths():
    torch.manual_seed(0)
    module = fnn.Attention(12, 3, attn_head_dim=5, dim_out=7, gated=True, scale_norm=True).eval()
    x, mask = torch.randn(2, 4, 12), torch.tensor([True, True, False, True]).expand(4, 4)
    q, k, v = module.qkv(x).view(2, 4, 3, 3, 5).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.mT) * 5**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    heads = module.norm((weights @ v).transpose(1, 2).reshape(2, 4, 15))
    expected = module.proj(heads * module.gate(x).sigmoid())
    assert torch.allclose(module(x, attn_mask=mask), expected, atol=1e-6)
    assert module(x[:0]).shape == (0, 4, 7)
    with pytest.raises(ValueError, match=r"attn_mask, is_causal: expected neither with topk = 2"):
        fnn.Attention(12, 3, topk=2)(x, is_causal=True)
    for arguments, message in (
        ((12, 0), "num_heads: expected 1 or more, got 0"),
        ((12, "2"), "dim, num_heads: expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fnn.Attention(*arguments)


@pytest.mark.parametrize("output", ["NLC", "NCL", "NHWC", "NCHW"])
def test_patch_embed_layouts_and_sizes(output):
    torch.manual_seed(0)
    any_size = fnn.PatchEmbed(None, 4, 3, 7, output_fmt=output)
    padded = fnn.PatchEmbed(12, 4, 3, 7, output_fmt=output, strict_img_size=False, dynamic_img_pad=True)
    padded.load_state_dict(any_size.state_dict())
    x = images(side=14)
    for module, pixels in ((any_size, x), (padded, F.pad(x, (0, 2, 0, 2)))):
        expected = module.proj(pixels)
        assert module.dynamic_feat_size((14, 14)) == expected.shape[2:]
        expected = expected if output == "NCHW" else expected.flatten(2) if output == "NCL" else expected.movedim(1, 3)
        assert torch.allclose(module(x), expected.flatten(1, 2) if output == "NLC" else expected, atol=1e-5)
    assert padded.feat_ratio() == 4 and padded.num_patches == 9
    padded.set_input_size((8, 16))
    assert padded.grid_size == (2, 4)
    with pytest.raises(ValueError, match=r"patch_size: expected \(4, 4\), got 8"):
        padded.set_input_size(patch_size=8)
    oblong = fnn.PatchEmbed(12, (4, 2), 3, 7)
    assert torch.equal(oblong(images()), oblong.proj(images()).flatten(2).transpose(1, 2))


MODULES = {
    "layer_norm": (lambda **place: fnn.LayerNorm(12, **place), (2, 5, 12)),
    "mlp": (lambda **place: fnn.Mlp(12, 20, norm_layer=fnn.LayerNorm, **place), (2, 5, 12)),
    "attention": (lambda **place: fnn.Attention(12, 2, qk_norm=True, **place), (2, 5, 12)),
    "topk_attention": (lambda **place: fnn.Attention(12, 2, topk=4, **place), (2, 5, 12)),
    "patch_embed": (lambda **place: fnn.PatchEmbed(8, 4, 3, 12, norm_layer=nn.LayerNorm, **place), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_copy_pickle_cast_and_compile(name):
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module, x = build().eval(), torch.randn(shape)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.1)):
        placed = build(device="cpu", dtype=dtype)
        placed.load_state_dict(module.state_dict())
        got = placed.eval()(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
    assert build(device="meta")(x.to("meta")).shape == expected.shape
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-6)


def test_the_package_alone_leads_to_what_goes_into_models():
    """In a process of its own: here they have been imported, and so are there."""
    code = "import fastmim_kernels as f; print(f.patch.apply.__name__, f.nn.Mlp.__name__, f.functional.linear_gelu.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["apply", "Mlp", "linear_gelu"], done.stderr
