"""Leaving the process group: torch's reducer must be gone by then, or it may wait for ever."""

import gc
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from trainer_run import TINY

from fastmim.engine.ddp import data_parallel, release_group


def join_alone(store: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def wrapped() -> DistributedDataParallel:
    """With a gradient: the group has worked."""
    parallel = data_parallel(torch.nn.Linear(8, 8), torch.device("cpu"))
    parallel(torch.ones(1, 8)).sum().backward()
    return parallel


def test_nothing_keeps_a_group_that_is_left(tmp_path):
    join_alone(tmp_path / "store")
    try:
        parallel = wrapped()
        group, reducer = weakref.ref(parallel.process_group), weakref.ref(parallel.reducer)
        release_group(parallel)
        assert reducer() is None and group() is not None
    finally:
        distributed.destroy_process_group()
    assert group() is None, "its threads end here, and not with the interpreter"


def come_and_go(times: str) -> None:
    """In a process of its own, which would stop for good after some tens of times if the reducer were the last to go."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(int(times)):
            come_and_go_once(Path(folder, str(i)))


def come_and_go_once(store: Path) -> None:
    join_alone(store)
    parallel = wrapped()
    release_group(parallel)
    distributed.destroy_process_group()


def test_groups_come_and_go(server):
    job = server.start(["--call", "test_ddp", "come_and_go", "200"])
    assert job.wait(limit_s=120) == [0], job.said()


def train_and_look(*argv: str) -> None:
    """In each process of a job: the run, and what is left of DDP when it leaves the group."""
    from fastmim import dist
    from fastmim.cli import run

    finish = dist.finish

    def looked_at() -> None:
        found = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
        print(f"{len(found)} DDP, {sum(hasattr(o, 'reducer') for o in found)} with a reducer", flush=True)
        finish()

    dist.finish = looked_at
    assert run(list(argv)) == 0


@pytest.mark.parametrize("engine", ["ddp", "zero"])
def test_a_run_lets_go_of_ddp_first(images, server, tmp_path, engine):
    argv = ["train", "--method", "mae", "--data", str(images / "train"), *TINY, "--engine", engine, "--steps", "2"]
    said = server.run(["--call", "test_ddp", "train_and_look", *argv, "--out", str(tmp_path / "run")], world=2)
    assert said.count("1 DDP, 0 with a reducer") == 2
