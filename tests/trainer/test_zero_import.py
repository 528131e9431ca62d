"""Checkpoints that DeepSpeed itself wrote, of every stage, become safetensors; broken and hostile ones one line."""

import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim import zero_import
from fastmim.cli import run
from fastmim.config import ConfigError
from fastmim.tokenizer.pickled import Reader
from fastmim.zero_import import read_checkpoint, read_file

STEPS, BATCH = 3, 8
# Name -> (stage, processes, precision)
CASES = {
    "zero0": (0, 2, "fp32"),
    "zero1": (1, 2, "fp32"),
    "zero2": (2, 2, "fp32"),
    "zero3": (3, 2, "fp32"),
    "zero2-bf16": (2, 2, "bf16"),
    "zero3-bf16": (3, 2, "bf16"),
    "zero1-alone": (1, 1, "fp32"),
    "zero3-alone": (3, 1, "fp32"),
}


class Plain(nn.Module):
    """Somebody's own model: sizes that no number of ranks divides, a frozen part, buffers, one tensor with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 3)
        self.again = nn.Linear(7, 5, bias=False)
        self.again.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.register_buffer("table", torch.randn(5))
        self.register_buffer("count", torch.tensor(41))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        hidden = torch.tanh(self.first(x) + self.again(x) + self.table.to(x.dtype))
        return F.mse_loss(self.scale * (self.second(hidden) @ self.frozen), y.to(x.dtype))


def model() -> Plain:
    torch.manual_seed(3)
    return Plain()


def groups(model: nn.Module) -> list[dict]:
    """Two groups with rates of their own: what is put together in the wrong order shows."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1, "lr": 0.05},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02}]  # fmt: skip


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        yield torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 3, generator=generator)


def write_checkpoints(folder: str) -> None:
    """In each process of a job: trains with plain DeepSpeed and has it save, for each case of this many processes."""
    from fastmim import dist
    from fastmim.engine.zero import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    from deepspeed.utils import safe_get_full_fp32_param

    dist.start(torch.device("cpu"))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank, world = dist.rank(), dist.world_size()
    for name, (stage, processes, precision) in CASES.items():
        if processes != world:
            continue
        net = model()
        config = {
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": precision == "bf16"},
            "steps_per_print": 2**62,
        }
        engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(groups(net)), config=config)
        for x, y in batches():
            engine.backward(engine(x[rank::world], y[rank::world]))
            engine.step()
        engine.save_checkpoint(str(Path(folder) / name))
        # What the running engine says of its fp32 weights.
        said = {
            n: safe_get_full_fp32_param(p) if stage else p.data for n, p in net.named_parameters() if p.requires_grad
        }
        if rank == 0:
            save_file(
                {n: t.detach().clone().contiguous() for n, t in said.items()}, Path(folder) / f"{name}.safetensors"
            )
        torch.distributed.barrier()
    dist.finish()


@pytest.fixture(scope="module")
def written(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    for world in (1, 2):
        argv = ["--call", "test_zero_import", "write_checkpoints", str(folder)]
        server.run(argv, world=world)
    return folder


@pytest.fixture(scope="module")
def straight() -> tuple[Plain, torch.optim.AdamW]:
    """The same steps in plain torch, in one process."""
    net = model()
    optimizer = torch.optim.AdamW(groups(net))
    for x, y in batches():
        optimizer.zero_grad()
        net(x, y).backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("name", CASES)
def test_weights_and_moments_are_those_of_the_run(written, straight, tmp_path, capsys, name):
    stage, world, precision = CASES[name]
    assert run(["zero-import", str(written / name), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"of ZeRO stage {stage} on {1 if stage == 0 else world} ranks, step {STEPS}" in said
    net, optimizer = straight
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == net.state_dict().keys()
    for key, expected in net.state_dict().items():
        assert found[key].dtype == (torch.float32 if expected.is_floating_point() else expected.dtype), key
        assert is_near(found[key], expected, precision), key
    own = load_file(written / f"{name}.safetensors")
    assert own and all(found[key].equal(tensor) for key, tensor in own.items()), "not what the engine has"
    if stage == 0:
        assert not (tmp_path / "out" / "optimizer.safetensors").exists() and "no moments" in said
        return
    moments = load_file(tmp_path / "out" / "optimizer.safetensors")
    trained = {key: p for key, p in net.named_parameters() if p.requires_grad}
    assert moments.keys() == {f"{kind}.{key}" for kind in ("exp_avg", "exp_avg_sq") for key in trained}
    for key, parameter in trained.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert is_near(moments[f"{kind}.{key}"], optimizer.state[parameter][kind], precision), f"{kind}.{key}"


def is_near(found: Tensor, expected: Tensor, precision: str) -> bool:
    """Equal up to the order of sums; with bf16, whose rounding Adam makes large, of the same direction."""
    if found.shape != expected.shape:
        return False
    if precision == "fp32" or not expected.is_floating_point():
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return F.cosine_similarity(found.flatten(), expected.flatten(), dim=0).item() > 0.9


def test_a_step_folder_is_as_good_as_the_one_around_it_and_wrappers_names_are_dropped(written, tmp_path, capsys):
    step = written / "zero2" / f"global_step{STEPS}"
    assert read_checkpoint(step).weights.keys() == read_checkpoint(written / "zero2").weights.keys()
    wrapped = shutil.copytree(step, tmp_path / "wrapped") / "mp_rank_00_model_states.pt"
    content = torch.load(wrapped, weights_only=False)
    content["param_shapes"] = [{f"module.net.{k}": v for k, v in each.items()} for each in content["param_shapes"]]
    for part in ("module", "frozen_param_fragments", "frozen_param_shapes"):
        content[part] = {f"module.net.{k}": v for k, v in content[part].items()}
    content["shared_params"] = {f"module.net.{k}": f"module.net.{v}" for k, v in content["shared_params"].items()}
    content["buffer_names"] = [f"module.net.{k}" for k in content["buffer_names"]]
    torch.save(content, wrapped)
    assert run(["zero-import", str(tmp_path / "wrapped"), str(tmp_path / "out")]) == 0
    assert "the prefix module.net. was dropped" in capsys.readouterr().out
    assert "second.bias" in load_file(tmp_path / "out" / "model.safetensors")


# -- broken and hostile ------------------------------------------------------------------------------------------


def one_line(arguments: list[str], capsys) -> str:
    """The message of a command that must fail with it alone."""
    capsys.readouterr()
    assert run(["zero-import", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def broken(written, tmp_path) -> Callable[[str], Path]:
    """A copy to break; its step folder."""
    return lambda name: shutil.copytree(written / name, tmp_path / name) / f"global_step{STEPS}"


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("zero1", "*zero_pp_rank_1_*optim_states.pt", "expected the optimizer states of 2 ranks, got 1 files"),
        ("zero2", "*zero_pp_rank_0_*optim_states.pt", "expected the optimizer states of 2 ranks, got 1 files"),
        ("zero3", "*zero_pp_rank_1_*optim_states.pt", "expected the optimizer states of 2 ranks, got 1 files"),
        ("zero3", "*zero_pp_rank_1_*model_states.pt", "expected the model states of 2 ranks, got 1 files"),
        ("zero2", "*model_states.pt", r"expected \*_model_states.pt files of DeepSpeed, got none"),
    ],
)
def test_a_missing_file_is_one_line(broken, tmp_path, capsys, name, file, words):
    (victim,) = broken(name).glob(file)
    victim.unlink()
    assert re.search(words, one_line([tmp_path / name, tmp_path / "out"], capsys))
    assert not (tmp_path / "out").exists()


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def grow(content: dict) -> None:
    content["param_shapes"][0]["first.weight"] = torch.Size([9, 7])


def shrink(content: dict) -> None:
    content["param_shapes"][0]["first.weight"] = torch.Size([2, 7])


def huge(content: dict) -> None:
    content["param_shapes"][0]["first.weight"] = torch.Size([1 << 40, 1 << 20])


def lose(content: dict) -> None:
    del content["param_shapes"]


def forget(content: dict) -> None:
    content["frozen_param_fragments"] = {}


def cut_frozen(content: dict) -> None:
    content["frozen_param_fragments"]["frozen"] = content["frozen_param_fragments"]["frozen"].flatten()[:1].clone()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("zero1", grow, r"expected \d+ numbers for first.weight to second.weight, got \d+; a file is damaged, or of"),
        ("zero2", shrink, r"expected \d+ numbers for first.weight to second.weight, got \d+"),
        ("zero2", huge, r"expected \d+ numbers for first.weight to second.weight, got \d+"),
        ("zero3", grow, r"expected \d+ numbers for first.weight to .*, got \d+"),
        ("zero3", shrink, r"expected \d+ numbers for first.weight to .*, got \d+"),
        ("zero3", cut_frozen, "frozen: expected 9 numbers, got"),
        ("zero2", lose, "did not find 'param_shapes'"),
        ("zero3", forget, "did not find 'frozen'"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_sizes_that_do_not_fit_are_one_line(broken, tmp_path, capsys, name, change, words):
    for path in broken(name).glob("*model_states.pt"):
        rewrite(path, change)
    assert re.search(words, one_line([tmp_path / name, tmp_path / "out"], capsys))
    assert not (tmp_path / "out").exists()


def test_shards_of_two_checkpoints_are_one_line(broken, tmp_path, capsys):
    """Rank 1's part comes from a larger model."""
    (victim,) = broken("zero2").glob("*zero_pp_rank_1_*optim_states.pt")

    def lengthen(content: dict) -> None:
        parts = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        parts[0] = torch.cat([parts[0], torch.zeros(8)])

    rewrite(victim, lengthen)
    assert "a file is damaged, or of another checkpoint" in one_line([tmp_path / "zero2", tmp_path / "out"], capsys)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class EvilRebuild(Evil):
    """The same behind a function that DeepSpeed's files do use."""

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (f"touch {self.canary}",), {})


@pytest.mark.parametrize("kind", [Evil, EvilRebuild])
@pytest.mark.parametrize("file", ["*model_states.pt", "*zero_pp_rank_1_*optim_states.pt"])
def test_an_object_that_would_run_something_is_refused(broken, tmp_path, capsys, kind, file):
    canary = tmp_path / "canary"
    (victim,) = broken("zero1").glob(file)
    rewrite(victim, lambda content: content.update(extra=kind(canary)))
    said = one_line([tmp_path / "zero1", tmp_path / "out"], capsys)
    assert victim.name in said and ("system" in said or "another function" in said)
    assert not canary.exists() and not (tmp_path / "out").exists()
    with suppress(AttributeError):  # after it has run
        pickle.loads(pickle.dumps(kind(canary)))  # the case can tell
    assert canary.exists()


class LookedUp:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 pickle it."""

    def __reduce__(self):
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return getattr, (ZeroStageEnum, "weights")


def test_members_of_enumerations_are_read_whichever_python_wrote_them(broken, tmp_path):
    (victim,) = broken("zero1").glob("*zero_pp_rank_1_*optim_states.pt")
    rewrite(victim, lambda content: content.update(extra=LookedUp()))
    assert b"getattr" in victim.read_bytes()
    assert run(["zero-import", str(tmp_path / "zero1"), str(tmp_path / "out")]) == 0


def test_damaged_files_are_one_line(broken, tmp_path, capsys):
    (victim,) = broken("zero2").glob("*zero_pp_rank_0_*optim_states.pt")
    data = victim.read_bytes()
    for damaged in (
        b"",
        data[:100],
        data[: len(data) // 2],
        b"PK\x03\x04" + bytes(500),
        b"<html>",
        pickle.dumps({"a": 1}),
    ):
        victim.write_bytes(damaged)
        assert victim.name in one_line([tmp_path / "zero2", tmp_path / "out"], capsys)


def test_a_bomb_is_not_inflated(written, tmp_path, monkeypatch):
    """A compressed archive: 64 MB of zeros in some kilobytes."""
    bomb = tmp_path / "bomb.pt"
    torch.save({"x": torch.zeros(1 << 24)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    monkeypatch.setattr(zero_import, "ZeroReader", lambda file: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match="the archive is compressed"):
        read_file(bomb)


def test_nested_references_cost_what_they_take_on_disk(tmp_path):
    """Thirty lists, each of which holds the next one twenty times: 20^30 entries for who follows each."""
    value: list = [1]
    for _ in range(30):
        value = [value] * 20
    torch.save({"deep": value, "own": {}}, tmp_path / "deep.pt")
    found = read_file(tmp_path / "deep.pt")["deep"]
    assert len(found) == 20 and found[0] is found[19]


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "gone", "", ".."])
def test_latest_names_nothing_outside(broken, tmp_path, capsys, tag):
    broken("zero2")
    shutil.copytree(tmp_path / "zero2" / f"global_step{STEPS}", tmp_path / "elsewhere")
    (tmp_path / "zero2" / "latest").write_text(tag)
    assert "expected the name of a folder beside it" in one_line([tmp_path / "zero2", tmp_path / "out"], capsys)


def test_what_exists_is_not_overwritten_and_what_is_no_checkpoint_is_said(written, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "not to exist; name another folder" in one_line([written / "zero2", tmp_path / "out"], capsys)
    assert "got none" in one_line([tmp_path / "out", tmp_path / "new"], capsys)
    assert "got none" in one_line([tmp_path / "nowhere", tmp_path / "new"], capsys)


def test_the_names_that_deepspeed_uses_are_known_to_its_reader_alone(written):
    (path,) = (written / "zero2").glob("*/*zero_pp_rank_0_*optim_states.pt")
    with zipfile.ZipFile(path) as archive:
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with (
            archive.open(index) as file,
            pytest.raises(pickle.UnpicklingError, match=r"asks for (deepspeed|__builtin__\.getattr)"),
        ):
            Reader(file).load()
    assert math.isfinite(read_file(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].sum())
