"""The d-VAE encoder against loops in float64; its published file read without running anything."""

import functools
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from dalle_case import pictures, tiny
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fastmim.tokenizer import DalleEncoder, dalle, load_dalle
from fastmim.tokenizer.weights import fingerprint

# ---- the network


def slow_convolution(x, w, b):
    """(C, H, W), (O, C, k, k), (O,) in float64: a sum over the k x k shifted images."""
    side = w.shape[-1]
    half = side // 2
    padded = np.zeros((x.shape[0], x.shape[1] + 2 * half, x.shape[2] + 2 * half))
    padded[:, half : half + x.shape[1], half : half + x.shape[2]] = x
    out = np.zeros((w.shape[0], x.shape[1], x.shape[2])) + b[:, None, None]
    for dy in range(side):
        for dx in range(side):
            window = padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
            out += np.tensordot(w[:, :, dy, dx], window, axes=1)
    return out


def slow_tokens(state, image, blocks=2):
    """(h, w) token ids of one image (C, H, W) in [0, 1], layer by layer from the published description."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}

    def convolve(name, x):
        return slow_convolution(x, w[f"blocks.{name}.w"], w[f"blocks.{name}.b"])

    x = convolve("input", 0.8 * image.double().numpy() + 0.1)
    for group in range(1, 5):
        for i in range(1, blocks + 1):
            name = f"group_{group}.block_{i}"
            branch = x
            for n in range(1, 5):
                branch = convolve(f"{name}.res_path.conv_{n}", np.maximum(branch, 0))
            if f"blocks.{name}.id_path.w" in w:
                x = convolve(f"{name}.id_path", x)
            x = x + branch / (4 * blocks) ** 2
        if group < 4:
            channels, height, width = x.shape
            x = x.reshape(channels, height // 2, 2, width // 2, 2).max((2, 4))
    return convolve("output.conv", np.maximum(x, 0)).argmax(0)


@pytest.mark.parametrize(("channels", "blocks"), [(3, 2), (1, 1), (5, 3)])
def test_dalle_tokens_equal_the_slow_network(channels, blocks):
    network = tiny(channels, blocks=blocks)
    images = pictures(2, channels, 24, 40)
    got = network(images)
    assert got.shape == (2, 15) and got.dtype == torch.int64
    slow = np.stack([slow_tokens(network.state_dict(), image, blocks).reshape(-1) for image in images])
    assert got.tolist() == slow.tolist()
    assert len(np.unique(slow)) > 3, "the case has several tokens"


def test_dalle_computes_chosen_cells_only_and_in_chunks(monkeypatch):
    network = tiny()
    images = pictures(3, 3, 32, 32)
    ids = torch.tensor([[0, 15, 7], [3, 2, 1], [9, 9, 4]])
    whole = network(images)
    products = []
    real = dalle.F.linear
    monkeypatch.setattr(dalle.F, "linear", lambda x, **rest: products.append(len(x)) or real(x, **rest))
    monkeypatch.setattr(dalle, "CELLS_AT_ONCE", 4)
    assert torch.equal(network(images, ids), whole.gather(1, ids))
    assert products == [4, 4, 1]


def test_the_last_layer_of_float16_features_is_as_exact_as_float32():
    """Weights of the published layer's size, and of sizes at which float16 runs out of digits."""
    g = torch.Generator().manual_seed(0)
    x = F.relu(torch.randn(40, 2048, generator=g)).half()
    for size in (2048**-0.5, 1e-4, 1e-6):
        weight, bias = size * torch.randn(70, 2048, generator=g), torch.randn(70, generator=g)
        exact = F.linear(x.double(), weight.double(), bias.double())
        ours = dalle.linear_of_halves(x, *dalle.halves(weight), bias)
        scale = (x.double() @ weight.double().abs().T).max()
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= 2**-22 * (scale + exact.abs().max()), size
        in_float16 = F.linear(x.float(), weight.half().float(), bias)
        assert (in_float16 - exact).abs().max() > 10 * (ours - exact).abs().max(), "the case needs both halves"


def test_float16_features_give_the_ids_of_the_same_features_in_float32(monkeypatch):
    """As on a GPU, whose features are of 16 bits; between two tokens whose weights differ in the 13th binary place."""
    network, images = tiny(vocabulary=500), pictures(2, 3, 48, 48)
    features = network.features(images).half()
    last = network.blocks["output"]["conv"]
    last.w[250:] = last.w[:250] * (
        1 + 2**-13 * torch.randn(250, 1, 1, 1, generator=torch.Generator().manual_seed(2)).sign()
    )
    last.b[250:] = last.b[:250]
    ids = []
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(network, "features", lambda _, dtype=dtype: features.to(dtype))
        ids.append(network(images))
    assert torch.equal(*ids) and len(ids[0].unique()) > 20 and {id // 250 for id in ids[0].flatten().tolist()} == {0, 1}
    monkeypatch.setattr(dalle, "halves", lambda weight: (weight.half(), torch.zeros_like(weight, dtype=torch.float16)))
    assert not torch.equal(network(images), ids[0]), "the case needs both halves"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_last_layer_on_a_gpu_is_near_float32():
    g = torch.Generator().manual_seed(0)
    x, weight = F.relu(torch.randn(300, 2048, generator=g)).half(), 2048**-0.5 * torch.randn(8192, 2048, generator=g)
    bias = torch.randn(8192, generator=g)
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours = dalle.linear_of_halves(x.cuda(), *dalle.halves(weight.cuda()), bias.cuda()).cpu()
    theirs = F.linear(x.cuda().float(), weight.cuda(), bias.cuda()).cpu()
    scale = (x.double() @ weight.double().abs().T).max()
    assert (ours - exact).abs().max() <= max(10 * (theirs - exact).abs().max(), 2**-20 * scale)
    assert (ours.argmax(1) == exact.argmax(1)).float().mean() >= 0.99


def test_dalle_ids_do_not_change_under_autocast():
    network, images = tiny(vocabulary=500), pictures(2, 3, 48, 48)
    plain = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images), plain)
        assert network.features(images).dtype == torch.bfloat16, "autocast would have lowered the precision"


def test_dalle_has_the_published_names_and_sizes():
    with torch.device("meta"):
        state = DalleEncoder().state_dict()
    widths = {1: (256, 256), 2: (256, 512), 3: (512, 1024), 4: (1024, 2048)}
    expected = {"blocks.input.w": (256, 3, 7, 7), "blocks.input.b": (256,)}
    for group, (before, out) in widths.items():
        for block, inputs in ((1, before), (2, out)):
            base = f"blocks.group_{group}.block_{block}"
            hidden = out // 4
            shapes = {"conv_1": (hidden, inputs, 3, 3), "conv_2": (hidden, hidden, 3, 3)}
            shapes |= {"conv_3": (hidden, hidden, 3, 3), "conv_4": (out, hidden, 1, 1)}
            for name, shape in shapes.items():
                expected |= {
                    f"{base}.res_path.{name}.w": shape,
                    f"{base}.res_path.{name}.b": (out if "4" in name else hidden,),
                }
            if inputs != out:
                expected |= {f"{base}.id_path.w": (out, inputs, 1, 1), f"{base}.id_path.b": (out,)}
    expected |= {"blocks.output.conv.w": (8192, 2048, 1, 1), "blocks.output.conv.b": (8192,)}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    assert round(sum(t.numel() for n, t in state.items() if n.endswith("w")) / 1e6, 2) == 53.76
    assert DalleEncoder.stride == 8


def test_dalle_gives_a_token_per_8_pixels_at_112():
    assert tiny(width=4)(torch.rand(1, 3, 112, 112)).shape == (1, 14 * 14)


# ---- its file


def fake_package():
    """Modules like those of the published pickle: whole classes with attributes of every kind that it holds."""
    utils, encoder, package = (types.ModuleType(n) for n in ("dall_e.utils", "dall_e.encoder", "dall_e"))

    class Conv2d(nn.Module):
        def __init__(self, n_in, n_out, kw, use_float16=True):
            super().__init__()
            self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
            self.device, self.requires_grad = torch.device("cpu"), False
            self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5, requires_grad=False)
            self.b = nn.Parameter(torch.randn(n_out) * 0.1, requires_grad=False)

        def forward(self, x):
            return nn.functional.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)

    class EncoderBlock(nn.Module):
        def __init__(self, n_in, n_out, n_layers):
            super().__init__()
            self.n_in, self.n_out, self.n_layers, self.post_gain = n_in, n_out, n_layers, 1 / n_layers**2
            self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
            parts = OrderedDict()
            sizes = [
                (n_in, n_out // 4, 3),
                (n_out // 4, n_out // 4, 3),
                (n_out // 4, n_out // 4, 3),
                (n_out // 4, n_out, 1),
            ]
            for i, size in enumerate(sizes, start=1):
                parts[f"relu_{i}"], parts[f"conv_{i}"] = nn.ReLU(), Conv2d(*size)
            self.res_path = nn.Sequential(parts)

        def forward(self, x):
            return self.id_path(x) + self.post_gain * self.res_path(x)

    class Encoder(nn.Module):
        def __init__(self, n_hid=8, n_blk_per_group=2, input_channels=3, vocab_size=23):
            super().__init__()
            self.group_count, self.n_hid, self.vocab_size = 4, n_hid, vocab_size
            self.activation, self.device = functools.partial(nn.functional.relu, inplace=False), torch.device("cpu")
            blocks, inputs = OrderedDict(input=Conv2d(input_channels, n_hid, 7)), n_hid
            for group in range(4):
                parts = OrderedDict()
                for i in range(n_blk_per_group):
                    parts[f"block_{i + 1}"] = EncoderBlock(inputs, n_hid * 2**group, 4 * n_blk_per_group)
                    inputs = n_hid * 2**group
                if group < 3:
                    parts["pool"] = nn.MaxPool2d(kernel_size=2)
                blocks[f"group_{group + 1}"] = nn.Sequential(parts)
            last = OrderedDict(relu=nn.ReLU(), conv=Conv2d(inputs, vocab_size, 1, use_float16=False))
            blocks["output"] = nn.Sequential(last)
            self.blocks = nn.Sequential(blocks)

        def forward(self, x):
            return self.blocks(x)

    for module, classes in ((utils, [Conv2d]), (encoder, [EncoderBlock, Encoder])):
        for c in classes:
            c.__module__, c.__qualname__ = module.__name__, c.__name__
            setattr(module, c.__name__, c)
    return {"dall_e": package, "dall_e.utils": utils, "dall_e.encoder": encoder}


@pytest.fixture
def published():
    """A made-up network of the published classes; they exist only while it is saved."""
    torch.manual_seed(3)
    modules = fake_package()
    return modules, modules["dall_e.encoder"].Encoder()


def save_published(published, path, legacy):
    modules, network = published
    sys.modules.update(modules)
    try:
        torch.save(network, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name in modules:
            del sys.modules[name]


FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@FORMATS
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_whole_published_module_is_read_without_its_classes(published, tmp_path, legacy):
    path = tmp_path / "encoder.pkl"
    save_published(published, path, legacy)
    assert "dall_e" not in sys.modules
    theirs = published[1]
    network = load_dalle(path)
    assert set(network.state_dict()) == set(theirs.state_dict())
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in network.state_dict().items())
    images = pictures(2, 3, 32, 32)
    assert torch.equal(network(images), theirs(0.8 * images + 0.1).argmax(1).flatten(1))
    assert not any(p.requires_grad for p in network.parameters())


@FORMATS
def test_plain_state_dicts_are_read(tmp_path, legacy):
    network = tiny()
    torch.save(network.state_dict(), tmp_path / "d.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_dalle(tmp_path / "d.pt")
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert fingerprint(loaded) == fingerprint(network)


@pytest.mark.parametrize("names", ["ours", "flava"])
def test_safetensors_are_read_under_both_names(tmp_path, names):
    network = tiny(channels=1, width=12, blocks=1, vocabulary=7)
    state = network.state_dict()
    if names == "flava":
        pairs = ((".block_", ".group.block_"), (".res_path.", ".res_path.path."))
        state = {functools.reduce(lambda n, pair: n.replace(*pair), pairs, name): t for name, t in state.items()}
        state = {n[:-1] + {"w": "weight", "b": "bias"}[n[-1]]: t for n, t in state.items()}
        assert "blocks.group_2.group.block_1.res_path.path.conv_3.weight" in state
    save_file(state, tmp_path / "d.safetensors")
    loaded = load_dalle(tmp_path / "d.safetensors")
    assert (loaded.channels, loaded.vocabulary) == (1, 7)
    images = pictures(1, 1, 16, 16)
    assert torch.equal(loaded(images), network(images))


def test_low_precision_and_strided_weights_become_float32(tmp_path):
    network = tiny()
    state = {n: t.half() for n, t in network.state_dict().items()}
    shared = torch.stack([state["blocks.output.conv.w"]] * 2, -1)
    state["blocks.output.conv.w"] = shared[..., 1]
    assert not state["blocks.output.conv.w"].is_contiguous()
    torch.save(state, tmp_path / "d.pt")
    for name, tensor in load_dalle(tmp_path / "d.pt").state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, network.state_dict()[name].half().float())


def test_loading_uses_no_random_numbers_and_no_outer_device(tmp_path):
    network = tiny()
    torch.save(network.state_dict(), tmp_path / "d.pt")
    before = torch.get_rng_state()
    with torch.device("meta"):
        loaded = load_dalle(tmp_path / "d.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_fingerprint_tells_weights_apart():
    one, other = tiny(), tiny()
    assert fingerprint(one) == fingerprint(other) and len(fingerprint(one)) == 64
    other.blocks["output"]["conv"].b[3] += 1e-6
    assert fingerprint(one) != fingerprint(other)
