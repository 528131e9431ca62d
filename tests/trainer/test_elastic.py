"""The same run on any engine, ZeRO stage and number of processes, and across them in one run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_run import TINY, losses

from fastmim.engine.base import choose, state_bytes

DEVICE = torch.device("cpu")


def arguments(images: Path, out: Path, steps: int, *extra: str, method: str = "cmae") -> list[str]:
    return ["train", "--method", method, "--data", str(images / "train"), *TINY, "--lr", "1e-5", "--steps", str(steps),
            "--save-every", "100", "--out", str(out), *extra]  # fmt: skip


@pytest.fixture(scope="module")
def straight(images, server, tmp_path_factory) -> list[float]:
    """Losses of 20 steps of one plain process."""
    out = tmp_path_factory.mktemp("straight") / "run"
    server.run(arguments(images, out, 20))
    return losses(out)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, []),
        (2, ["--zero", "0"]),
        (2, ["--zero", "1"]),
        (2, ["--zero", "2"]),
        (2, ["--zero", "3"]),
    ],
    ids=lambda v: "-".join(v).replace("--", "") or "ddp" if isinstance(v, list) else str(v),
)
def test_twenty_steps_have_the_losses_of_one_plain_process(images, server, straight, tmp_path, world, flags):
    out = tmp_path / "run"
    server.run(arguments(images, out, 20, *flags), world=world)
    assert losses(out) == pytest.approx(straight, rel=1e-6)


@pytest.mark.parametrize(
    ("world", "stage", "offload"), [(1, "2", "optimizer"), (2, "1", "optimizer"), (1, "3", "all"), (2, "3", "all")]
)
def test_with_offload_too_also_when_the_run_is_interrupted(images, server, straight, tmp_path, world, stage, offload):
    argv = arguments(images, tmp_path / "run", 20, "--zero", stage, "--zero-offload", offload)
    server.run(argv, world=world, code=75, FASTMIM_FAULT="step:optimizer:term@9")
    said = server.run([*argv, "--resume"], world=world)
    assert f"ZeRO stage {stage}, optimizer" in said and "resumed at step" in said
    assert losses(tmp_path / "run") == pytest.approx(straight, rel=1e-6)


def test_two_one_four_processes_across_engines_are_the_straight_run(images, server, tmp_path):
    """2 processes of ZeRO-2, one plain process, 4 processes of ZeRO-3: 50 steps with the losses of one process."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    server.run(arguments(images, straight, 50, method="mae"))
    # Rank 1 alone is told to stop: the agreement takes one more step.
    stages = [
        (2, ["--zero", "2"], "step:optimizer:term@18#1", 19),
        (1, [], "step:optimizer:usr1@16", 35),
        (4, ["--zero", "3"], "", 50),
    ]
    for world, flags, fault, end in stages:
        argv = arguments(images, out, 50, "--resume", "auto", *flags, method="mae")
        said = server.run(argv, world=world, code=75 if fault else 0, FASTMIM_FAULT=fault)
        assert f"step {end}/50" in said and f"step {end + 1}/50" not in said
    assert losses(out) == pytest.approx(losses(straight), rel=1e-6)


# -- engine to engine, without a step between: nothing may change ------------------------------------------------

NAMES = ["single", "ddp", "zero0", "zero1", "zero2", "zero3", "zero2-optimizer", "zero3-all"]


def save_all_load_all(folder: str) -> None:
    """In each process of a job: two steps on each engine, its state saved; then each loads each and saves again."""
    from fastmim_pipelines import make_loader

    from fastmim import checkpoint, dist
    from fastmim.arguments import parse_train
    from fastmim.engine import base as engines
    from fastmim.methods import base as methods
    from fastmim.saving import HostCopy, stored

    dist.start(DEVICE)
    world, root = dist.world_size(), Path(folder)
    config = parse_train(["--method", "cmae", "--data", ".", *TINY, "--steps", "4"])

    def build(name: str):
        method = methods.build("cmae", config.model_spec(), config.options, 0)
        engine, _, offload = name.partition("-")
        stage = int(engine[4:]) if engine.startswith("zero") else 0
        return engines.build(engine.rstrip("0123"), method, engines.EngineSpec(
            device=DEVICE, precision="fp32", accumulate=1, micro_batch=8 // world, lr=1e-3, weight_decay=0.05,
            betas=(0.9, 0.95), clip=None, zero_stage=stage, zero_offload=offload or "none"))  # fmt: skip

    def save(engine, path: Path) -> None:
        copy = HostCopy()
        engine.save(copy.put)
        if dist.is_main():
            path.mkdir(parents=True)
            for file, tensors in copy.files.items():
                checkpoint.write_tensors(path / file, tensors)
        if world > 1:
            torch.distributed.barrier()

    names = [name for name in NAMES if world == 1 or name != "single"]
    for name in names:
        engine = build(name)
        pairs = engine.method.ema_pairs()
        loader, _ = make_loader(
            "synthetic", engine.method.crops, batch_size=8, in_chans=3, rank=dist.rank(), world=world
        )
        batches = iter(loader.epoch(0))
        for step in range(2):
            out = engine.forward(next(batches), torch.tensor([0, step]))
            engine.backward(out.loss)
            engine.step(pairs, 0.9)
        save(engine, root / name)
        engine.close()
    for to in names:
        engine = build(to)
        for came_from in names:
            with stored(root / came_from, DEVICE) as source:
                engine.load(source)
            save(engine, root / f"{came_from} to {to}")
        engine.close()
    dist.finish()


@pytest.mark.parametrize("world", [1, 2])
def test_every_engine_loads_what_every_engine_saved_bit_for_bit(server, tmp_path, world):
    argv = ["--call", "test_elastic", "save_all_load_all", str(tmp_path / "states")]
    server.run(argv, world=world)
    names = [name for name in NAMES if world == 1 or name != "single"]
    for came_from in names:
        for file in ("model.safetensors", "optimizer.safetensors"):
            saved = load_file(tmp_path / "states" / came_from / file)
            assert saved and all(tensor.isfinite().all() for tensor in saved.values())
            for to in names:
                again = load_file(tmp_path / "states" / f"{came_from} to {to}" / file)
                different = [key for key in saved | again if not saved[key].equal(again[key])]
                assert not different, f"{came_from} -> {to}: {file}: {different[:3]}"


# -- the choice --------------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.mark.parametrize(
    ("world", "parameters", "memory", "expected"),
    [
        (1, 86e6, None, ("single", 0, "none")),
        (4, 86e6, None, ("ddp", 0, "none")),
        (1, 86e6, 80 * GIB, ("single", 0, "none")),
        (8, 600e6, 80 * GIB, ("ddp", 0, "none")),
        (8, 3.5e9, 80 * GIB, ("zero", 1, "none")),
        (8, 6e9, 80 * GIB, ("zero", 2, "none")),
        (64, 30e9, 80 * GIB, ("zero", 3, "none")),
        (1, 5e9, 80 * GIB, ("zero", 2, "optimizer")),
        (1, 30e9, 80 * GIB, ("zero", 3, "all")),
    ],
)
def test_auto_takes_the_fastest_engine_that_fits_and_says_why(world, parameters, memory, expected):
    choice = choose("auto", None, world, int(parameters), memory)
    assert choice[:3] == expected
    if memory is not None:
        need = state_bytes(*expected, world, int(parameters), 0) / GIB
        assert f"{need:.1f} GiB of a device's 80" in choice.reason
    if expected[0] == "zero":
        assert "would take" in choice.reason


def test_what_is_asked_for_is_taken():
    assert choose("auto", 3, 2, 10, 80 * GIB, offload="all") == ("zero", 3, "all", "--zero 3 was given")
    assert choose("auto", 3, 1, 10, 80 * GIB, offload="optimizer")[:3] == ("zero", 3, "optimizer")
    assert choose("zero", None, 2, 10, 1)[:3] == ("zero", 0, "none")
    assert choose("ddp", None, 2, 10**12, GIB)[:3] == ("ddp", 0, "none")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_has_nothing_to_shard(stage):
    choice = choose("auto", stage, 1, 10, 80 * GIB)
    assert choice[:3] == ("zero", 0, "none") and f"--zero {stage} was given, and one process has all" in choice.reason
    assert choose("auto", stage, 2, 10, 80 * GIB)[:3] == ("zero", stage, "none")


@pytest.mark.parametrize(
    ("engine", "stage", "offload", "world", "bytes_each"),
    # fp32: 4 weight + 4 gradient + 8 moments; stages 1 and 2 add a copy of the weights.
    [("ddp", 0, "none", 8, 16), ("zero", 1, "none", 4, 4 + 4 + 12 / 4), ("zero", 2, "none", 4, 4 + 4 / 4 + 12 / 4),
     ("zero", 3, "none", 4, 16 / 4), ("zero", 2, "optimizer", 1, 4 + 4), ("zero", 3, "all", 2, 4 / 2)],
)  # fmt: skip
def test_state_bytes_are_those_of_the_papers_table(engine, stage, offload, world, bytes_each):
    assert state_bytes(engine, stage, offload, world, 1000, 0) == pytest.approx(1000 * bytes_each)
