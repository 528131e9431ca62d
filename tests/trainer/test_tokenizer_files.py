"""Files that are not the tokenizer's: attacks, damage, other weights; one clear line, and nothing is run."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from dalle_case import tiny
from torch import nn

from fastmim.config import ConfigError
from fastmim.tokenizer import load_dalle, pickled
from fastmim.tokenizer.weights import PUBLISHED

# ---- its file


FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


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
