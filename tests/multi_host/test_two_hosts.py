"""One run on two hosts, by torchrun's rendezvous and by DeepSpeed's launcher; each host loses power once.

The hosts share the images and no other folder: each has its own run directory, and only the first one's is used.
FASTMIM_HOSTS=loopback does without network namespaces, where these are permitted.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Hosts
from trainer_run import ROOT, TINY, environment, free_port, losses, train, write_images

STEPS = 20
RUN = [*TINY, "--lr", "1e-5", "--steps", str(STEPS), "--mae.decoder-width", "32"]


@pytest.fixture
def hosts(capsys) -> Iterator[Hosts]:
    two = Hosts(loopback=os.environ.get("FASTMIM_HOSTS") == "loopback")
    with capsys.disabled():
        print(f"\ntwo hosts: {two.reason}")
    yield two
    two.close()


def launch(hosts: Hosts, launcher: str, folder: Path, images: Path, *flags: str, **env: str) -> list:
    """Starts the job on both; processes by host."""
    port, bin_folder, first = str(free_port()), Path(environment()["PATH"].split(":")[0]), hosts.hosts[0].address
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts.hosts))
    processes = []
    for rank, host in enumerate(hosts.hosts):
        front = {
            "torchrun": ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", port,
                         "--rdzv-endpoint", f"{first}:{port}", "--local-addr", host.address],
            "deepspeed": ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank), "--master_addr",
                          first, "--master_port", port],
        }[launcher]  # fmt: skip
        argv = ["--method", "mae", "--data", str(images), *RUN, "--save-every", "2", "--out", str(folder / host.name),
                "--resume", "auto", *flags]  # fmt: skip
        command = [str(bin_folder / front[0]), *front[1:], str(ROOT / "fastmim" / "train.py"), *argv]
        processes.append(hosts.start(rank, command, environment(**env), folder, folder / f"{host.name}.log"))
    return processes


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def wait_until(condition: Callable[[], bool], what: str, folder: Path, running: list, limit_s: float = 300) -> None:
    """Until the condition holds; fails if one of the processes ends before."""
    end = time.monotonic() + limit_s
    while not condition():
        ended = [process.returncode for process in running if process.poll() is not None]
        assert not ended and time.monotonic() < end, f"{what}, {ended}: {said(folder)[-3000:]}"
        time.sleep(0.05)


def has_saved(out: Path, step: int) -> Callable[[], bool]:
    return lambda: last_step(out) >= step


def last_step(out: Path) -> int:
    return max((int(p.name[5:]) for p in (out / "checkpoints").glob("step-???????")), default=0)


@pytest.mark.timeout(900)
def test_a_run_on_two_hosts_survives_the_loss_of_either(hosts, tmp_path):
    images = write_images(tmp_path / "images", 12)
    out = tmp_path / hosts.hosts[0].name
    reached = 0
    for launcher, flags, victim in (("torchrun", [], 1), ("deepspeed", ["--zero", "2"], 0)):
        # The victim stops itself in its seventh step, so that both wait there until the power is cut.
        held = f"step:forward:stop@7#{victim}"
        both = launch(hosts, launcher, tmp_path, images, *flags, FASTMIM_FAULT=held)
        wait_until(has_saved(out, reached + 2), f"{launcher} trains", tmp_path, both)
        hosts.cut_power(both[victim])
        other = both[1 - victim]
        wait_until(lambda other=other: other.poll() is not None, "the other host notices", tmp_path, [])
        assert other.returncode != 0
        reached = last_step(out)
        assert 0 < reached < STEPS
    # Continues with --zero 2, which the folder on the first host says, and the second host cannot read.
    both = launch(hosts, "torchrun", tmp_path, images)
    assert [p.wait(300) for p in both] == [0, 0], said(tmp_path)[-3000:]
    assert f"resumed at step {reached} of {STEPS}" in said(tmp_path)
    assert said(tmp_path).count("engine    zero, ZeRO stage 2") == 2
    for host in hosts.hosts:
        assert "another process of the run is gone" in (tmp_path / f"{host.name}.log").read_text()
    assert not (tmp_path / hosts.hosts[1].name).exists()
    straight = tmp_path / "straight"
    done = train(["--method", "mae", "--data", str(images), *RUN, "--out", str(straight)])
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(straight), rel=1e-6)
