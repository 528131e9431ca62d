"""The d-VAE encoder against loops in float64; its file read without running it; recordings of its tokens."""

import functools
import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from fastmim_pipelines.spec import Batch
from safetensors.torch import save_file
from slow_reference import draw_flips, model_spec
from torch import nn

from fastmim.config import ConfigError
from fastmim.tokenizer import DalleEncoder, RecordedTarget, TokenTarget, dalle, load_dalle, pickled, record_tokens
from fastmim.tokenizer.recorded import checksum
from fastmim.tokenizer.weights import PUBLISHED, fingerprint


def tiny(channels=3, width=8, blocks=2, vocabulary=23, seed=0):
    """Random weights; the last bias is such that no token is the likeliest one everywhere."""
    torch.manual_seed(seed)
    network = DalleEncoder(channels, width, blocks, vocabulary)
    for name, parameter in network.named_parameters():
        if name.endswith(".b"):
            parameter.normal_(std=0.1)
    last = network.blocks["output"]["conv"]
    cells = network.features(pictures(8, channels, 16, 16)).transpose(0, 1).flatten(1)
    last.b.copy_(-(last.w.flatten(1) @ cells).mean(1))
    return network


def pictures(count, channels, height, width, seed=1):
    """Colored squares of 8 pixels with some noise, in [0, 1]."""
    g = torch.Generator().manual_seed(seed)
    squares = torch.rand(count, channels, height // 8, width // 8, generator=g)
    squares = squares.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.7 * squares + 0.3 * torch.rand(count, channels, height, width, generator=g)


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
    monkeypatch.setattr(dalle.F, "linear", lambda x, *rest: products.append(len(x)) or real(x, *rest))
    monkeypatch.setattr(dalle, "CELLS_AT_ONCE", 4)
    assert torch.equal(network(images, ids), whole.gather(1, ids))
    assert products == [4, 4, 1]


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


# ---- files that are not what they should be


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "system": lambda path: Call(os.system, f"touch {path}"),
    "eval": lambda path: Call(eval, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Call(open, str(path), "w"),
    "import": lambda path: Call(__import__, "antigravity"),
    "getattr": lambda path: Call(getattr, os, "system"),
    "torch.load": lambda path: Call(torch.load, str(path)),
    "storage": lambda path: Call(torch.storage._load_from_bytes, b"x"),
}


@FORMATS
@pytest.mark.parametrize("attack", ATTACKS)
def test_pickles_that_call_anything_are_refused(tmp_path, attack, legacy):
    marker = tmp_path / "marker"
    try:
        torch.save({"blocks.input.w": torch.zeros(3), "x": ATTACKS[attack](marker)}, tmp_path / "e.pkl",
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
    except TypeError:  # a module cannot be pickled; its name can
        data = pickle.dumps(Call(getattr, "os", "system"), protocol=2)
        (tmp_path / "e.pkl").write_bytes(data)
    with pytest.raises(ConfigError, match=r"expected weights that .* wrote: it asks for") as caught:
        load_dalle(tmp_path / "e.pkl")
    assert not marker.exists() and "\n" not in str(caught.value)


def test_the_refusal_names_what_was_asked_for(tmp_path):
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(Call(os.system, "true"), protocol=2))
    with pytest.raises(ConfigError, match=r"it asks for (posix|nt)\.system, which weights have no use for"):
        load_dalle(tmp_path / "e.pkl")


def test_expected_names_are_never_resolved(monkeypatch):
    """Even a function below torch.nn that exists is not called: a stand-in takes its arguments."""
    called = []
    monkeypatch.setattr(torch.nn.functional, "relu", lambda *arguments: called.append(arguments))
    data = b"\x80\x02ctorch.nn.functional\nrelu\n(I1\ntR."
    assert pickle.loads(data) is None and called == [(1,)], "a plain unpickler calls it"
    assert isinstance(pickled.Reader(io.BytesIO(data)).load(), pickled.Inert) and len(called) == 1


def test_pickles_cannot_ask_for_endless_memory():
    """C Python makes a table as long as the largest number of an object: here 32 GiB."""
    data = b"\x80\x02]r\xff\xff\xff\xff."
    with pytest.raises(pickle.UnpicklingError, match="it numbers an object 4294967295"):
        pickled.Reader(io.BytesIO(data)).load()


def test_tensors_beyond_their_storage_are_refused():
    storage = pickled.Storage(torch.float32, "0", 10)
    assert pickled.rebuild_tensor(storage, 1, (3, 3), (3, 1)).size == (3, 3)
    for offset, size, stride in [(0, (11,), (1,)), (2, (3, 3), (3, 1)), (0, (2, 2), (9, 1)), (-1, (2,), (1,)),
                                 (0, (10**9,), (0,)), (0, (2,), (1, 1)), (0, (2.0,), (1,))]:  # fmt: skip
        with pytest.raises(pickle.UnpicklingError):
            pickled.rebuild_tensor(storage, offset, size, stride)
    with pytest.raises(pickle.UnpicklingError):
        pickled.rebuild_tensor("storage", 0, (1,), (1,))


def test_damaged_and_other_files_are_one_clear_line(tmp_path):
    path = tmp_path / "encoder.pkl"

    def message():
        with pytest.raises(ConfigError) as caught:
            load_dalle(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert PUBLISHED in message()
    for data, expected in [
        (b"<!DOCTYPE html><html>", "a web page"), (b"", "torch.save"), (b"not a pickle", "torch.save"),
        (pickle.dumps({"a": 1}), "a pickle of something else"), (b"PK\x03\x04nothing", "torch.save"),
    ]:  # fmt: skip
        path.write_bytes(data)
        assert expected in message()

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"")
    assert "no data.pkl" in message()

    torch.save(tiny().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message()
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "z").replace(path)
    assert "compressed" in message()

    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:-4] if name.endswith("/data/3") else old.read(name))
    assert "data/3 has another size than the index says" in message()

    torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5])
    assert "ends too early" in message()


def test_other_weights_are_refused_by_name_and_shape(tmp_path):
    path, state = tmp_path / "d.pt", tiny().state_dict()

    def message(**change):
        torch.save({n: t for n, t in (state | change).items() if t is not None}, path)
        with pytest.raises(ConfigError) as caught:
            load_dalle(path)
        return str(caught.value)

    name = "blocks.group_3.block_2.res_path.conv_2.w"
    assert f"{name} (8, 8, 3, 3), got nothing" in message(**{name: None})
    assert f"{name} (8, 8, 3, 3), got (8, 8, 1, 1)" in message(**{name: torch.zeros(8, 8, 1, 1)})
    assert "more nothing, got (2,)" in message(more=torch.zeros(2))
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ConfigError, match=r"expected the d-VAE encoder with .* got bias, weight"):
        load_dalle(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_flipped_bytes_give_tensors_or_an_expected_error(tmp_path):
    """1000 damaged indexes: no other exception, no name resolved, no long wait."""
    torch.save(tiny(width=4, blocks=1, vocabulary=3).state_dict(), tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "d.pt") as archive:
        index = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        data = bytearray(index)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        try:
            dict(pickled.named_views(pickled.Reader(io.BytesIO(bytes(data))).load()))
        except pickled.PICKLE_ERRORS:
            refused += 1
    assert refused > 500


# ---- recordings


class StubLoader:
    """Two epochs' worth of random crops; a sample's crops are functions of (epoch, sample)."""

    steps_per_epoch = 3

    def __init__(self, sizes, batch=4):
        self.sizes, self.batch = sizes, batch

    def epoch(self, epoch, start_step=0):
        order = torch.randperm(3 * self.batch, generator=torch.Generator().manual_seed(epoch))
        for step in range(start_step, 3):
            ids = order[step * self.batch : (step + 1) * self.batch] + 10
            yield Batch(tuple(torch.stack([self.crop(epoch, int(i), s) for i in ids]) for s in self.sizes), ids)

    def crop(self, epoch, sample, size):
        return (pictures(1, 3, *size, seed=1000 * epoch + sample)[0] * 255).to(torch.uint8)


MODEL = model_spec(16, 24, 4)  # a grid of 4 x 6


@pytest.fixture
def recording(tmp_path):
    network = tiny()
    loader = StubLoader([(16, 24), (32, 48)])
    record_tokens(tmp_path / "r", loader, network, MODEL, seed=5, steps=range(2, 7), device=torch.device("cpu"))
    return tmp_path / "r", network, loader


def steps_of(loader, first, last):
    step = 0
    while step < last:
        for batch in loader.epoch(step // 3):
            if first <= step < last:
                yield step, batch
            step += 1


def test_recorded_tokens_equal_computed_ones(recording):
    folder, network, loader = recording
    live, recorded = TokenTarget(network, MODEL), RecordedTarget(folder, MODEL, network)
    assert recorded.vocabulary == 23 and recorded.crops((0.1, 1.0)) == ()
    flipped, tokens = set(), set()
    for step, batch in steps_of(loader, 2, 7):
        rng = torch.tensor([5, step])
        flip = torch.tensor(draw_flips(rng, batch.ids))
        flipped |= set(flip.tolist())
        ids = torch.stack([torch.randperm(24)[:9] for _ in range(4)])
        expected = live(batch, rng, flip, ids)
        assert torch.equal(recorded(batch, rng, flip, ids), expected)
        # Half of a batch in another order, as a rank or a micro-batch has it, without the tokenizer's crop.
        part = [3, 1]
        half = Batch((batch.crops[0][part],), batch.ids[part])
        assert torch.equal(recorded(half, rng, flip[part], ids[part]), expected[part])
        assert torch.equal(recorded(half, rng, flip[part], None).gather(1, ids[part]), expected[part])
        tokens |= set(expected.flatten().tolist())
    assert flipped == {True, False} and len(tokens) > 5, "the case can tell flips and patches apart"


def test_token_target_flips_and_scales_what_the_tokenizer_sees():
    class Spy(nn.Module):
        vocabulary, stride, seen = 5, 3, None

        def forward(self, images, ids=None):
            self.seen = images
            return ids

    network = Spy()
    target = TokenTarget(network, MODEL)
    (crop,) = target.crops((0.08, 0.9))
    assert crop.size == (12, 18) and crop.scale == (0.08, 0.9) and crop.filter == "lanczos" and crop.view == 0
    images = torch.randint(0, 256, (3, 3, 12, 18), dtype=torch.uint8)
    batch = Batch((torch.zeros(3, 3, 16, 24), images), torch.arange(3))
    target(batch, torch.tensor([1, 1]), torch.tensor([True, False, True]), None)
    for i, flip in enumerate([True, False, True]):
        for x in (0, 5, 17):
            column = images[i, :, :, 17 - x if flip else x].float() / 255
            torch.testing.assert_close(network.seen[i, :, :, x], column)


def test_recordings_refuse_what_they_were_not_made_for(recording, tmp_path):
    folder, network, loader = recording
    recorded = RecordedTarget(folder, MODEL)
    (_, batch), (_, later) = steps_of(loader, 2, 4)
    flip = torch.zeros(4, dtype=torch.bool)

    def message(batch, *rng):
        with pytest.raises(ConfigError) as caught:
            recorded(batch, torch.tensor(rng), flip, None)
        return str(caught.value)

    assert "expected seed 6, got 5" in message(batch, 6, 2)
    assert "expected step 1, got a recording of 2..6" in message(batch, 5, 1)
    assert "expected step 7, got a recording of 2..6" in message(batch, 5, 7)
    assert "step 2 was recorded with another id of sample" in message(later, 5, 2)
    other = Batch((batch.crops[0].clone(),), batch.ids)
    other.crops[0][2, 1, 2 + 4 * 3, 2 + 4 * 5] ^= 1
    assert f"another checksum of sample {batch.ids[2]}" in message(other, 5, 2)

    with pytest.raises(ConfigError, match=r"expected grid \[4, 4\], got \[4, 6\]"):
        RecordedTarget(folder, model_spec(16, 16, 4))
    with pytest.raises(ConfigError, match="expected tokenizer"):
        RecordedTarget(folder, MODEL, tiny(seed=1))
    with pytest.raises(ConfigError, match="holds a recording already"):
        record_tokens(folder, loader, network, MODEL, seed=5, steps=range(1), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"expected at least one step to record, got 4\.\.3"):
        record_tokens(tmp_path / "x", loader, network, MODEL, seed=5, steps=range(4, 4), device=torch.device("cpu"))
    (folder / "tokens.json").unlink()
    with pytest.raises(ConfigError, match="expected a finished recording"):
        RecordedTarget(folder, MODEL)
    large = tiny(vocabulary=40000, width=4)
    with pytest.raises(ConfigError, match="vocabulary of at most 32768, got 40000"):
        record_tokens(tmp_path / "x", loader, large, MODEL, seed=5, steps=range(1), device=torch.device("cpu"))


def test_recording_is_small_and_describes_itself(recording):
    folder, network, _ = recording
    description = json.loads((folder / "tokens.json").read_text())
    assert description == {
        "format": "fastmim-tokens-1", "seed": 5, "first_step": 2, "grid": [4, 6], "vocabulary": 23,
        "tokenizer": fingerprint(network),
    }  # fmt: skip
    records = np.load(folder / "tokens.npy", mmap_mode="r")
    assert records.shape == (5, 4) and records.dtype.itemsize == 8 + 8 + 2 * 24


def test_checksum_is_a_polynomial_modulo_2_to_64():
    images = torch.randint(0, 256, (3, 2, 8, 12), dtype=torch.uint8)
    for image, got in zip(images, checksum(images, 4).tolist(), strict=True):
        values = [int(image[c, y, x]) for c in range(2) for y in (2, 6) for x in (2, 6, 10)]
        total = sum(v * pow(6364136223846793005, i + 1, 2**64) for i, v in enumerate(values)) % 2**64
        assert got % 2**64 == total
