"""Models of timm, transformers and torchvision, patched, and timm's with the modules of this package in them."""

import importlib
import inspect
import re
import sys

import pytest
import torch
from fastmim_kernels import nn as fnn
from parity import PARTS, assert_parity, images
from torch import Tensor, nn

LIBRARIES = ("torchvision", "timm", "transformers")


@pytest.fixture(scope="module")
def peer():
    """Imports a library that is not needed; skips with the reason where it is absent or broken."""
    # torchvision built for CUDA does not load its ops beside a torch without; the models need none of them. Ops that are
    # declared for it, and what was imported upon them, are gone after these tests.
    before = set(sys.modules)
    with torch.library._scoped_library("torchvision", "FRAGMENT") as made_up:

        def load(name: str):
            for _ in range(3):
                try:
                    return importlib.import_module(name)
                except Exception as e:
                    missing = re.search(r"operator torchvision::(\w+) does not exist", str(e))
                    if missing is None:
                        pytest.skip(f"{name} does not import: {e}")
                    made_up.define(f"{missing[1]}() -> ()")
                    for module in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
                        del sys.modules[module]
            pytest.skip(f"{name} does not import")

        yield load
        is_made_up = bool(made_up._op_defs)
    if is_made_up:
        for module in [m for m in set(sys.modules) - before if m.split(".")[0] in LIBRARIES]:
            del sys.modules[module]


def test_timm_vision_transformer(peer):
    timm = peer("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, init_values=0.1, drop_path_rate=0.3)
    assert_parity(model.train(), images(side=32), parts=PARTS)


def test_transformers_vit_and_vitmae_and_dinov2(peer):
    peer("torchvision")
    library = peer("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=12)
    torch.manual_seed(0)

    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module, output: str):
            super().__init__()
            self.model, self.output = model, output

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[self.output]

    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    mae = library.ViTMAEForPreTraining(library.ViTMAEConfig(**sizes, **decoder, patch_size=4, norm_pix_loss=True))
    report = assert_parity(Wrapped(mae, "loss"), images(), parts=PARTS)
    assert [entry.part for entry in report.skipped] in ([], ["loss"])
    for config, model in ((library.ViTConfig, library.ViTModel), (library.Dinov2Config, library.Dinov2Model)):
        assert_parity(Wrapped(model(config(**sizes, patch_size=4)), "last_hidden_state"), images(), parts=PARTS)


def test_torchvision_vision_transformer(peer):
    peer("torchvision")
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(image_size=12, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)
    nn.init.normal_(model.heads.head.weight)
    assert_parity(model.train(), images(), parts=PARTS)


def test_modules_stand_in_for_those_of_timm(peer):
    """Arguments, initial values, results and gradients of a model that is built with ours in place of theirs."""
    peer("torchvision")
    timm = peer("timm")
    theirs = {"mlp_layer": timm.layers.Mlp, "attn_layer": timm.layers.Attention, "embed_layer": timm.layers.PatchEmbed}
    ours = {"mlp_layer": fnn.Mlp, "attn_layer": fnn.Attention, "embed_layer": fnn.PatchEmbed}
    for name, module in ours.items():
        known = inspect.signature(module).parameters
        assert set(inspect.signature(theirs[name]).parameters) <= set(known)
    sizes = dict(img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3)
    options = (
        dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, proj_drop_rate=0.2),
        dict(dynamic_img_size=True, dynamic_img_pad=True, act_layer="relu", proj_bias=False),
    )
    for option in options:
        results = []
        for modules in (theirs, ours):
            torch.manual_seed(0)
            model = timm.models.VisionTransformer(**sizes, **option, **modules)
            torch.manual_seed(1)
            x = images(side=14 if "dynamic_img_pad" in option else 12)
            out = model(x)
            gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
            results.append((model.state_dict(), [out, *gradients]))
        (state, expected), (state_of_ours, got) = results
        assert list(state) == list(state_of_ours)
        assert all(torch.equal(state[key], state_of_ours[key]) for key in state)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
