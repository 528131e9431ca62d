"""Kill storm: a run is killed at random moments and started again by the same command until it is done; the weights must
be those of the run that nobody killed, bit for bit.

Half of the kills come at a random time, the others at a random passage of a fault point (see fastmim/testing/faults.py),
most of them inside a save. Everything is drawn from the seed of the storm. `python tests/trainer/storm.py 200` runs it
alone (names of jobs may follow); the suite runs a few kills, or as many as the environment variable FASTMIM_STORM says.
"""

import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import Server
from safetensors.torch import load_file
from trainer_run import ROOT, TINY, environment, metrics, write_images

STEPS, SAVE_EVERY = 24, 2
# (name, processes, flags, share of the kills)
JOBS = [
    ("single", 1, [], 0.6),
    ("ddp x 2", 2, [], 0.3),
    ("zero-2 x 2", 2, ["--zero", "2"], 0.1),
]
POINTS = {
    "save:begin": 8, "save:write": 30, "save:fsync": 40, "save:rename": 8, "save:latest": 8, "save:delete": 6,
    "step:forward": 10, "step:update": 10, "step:optimizer": 10, "log:write": 10,
}  # fmt: skip
# For a run of seconds; what takes longer hangs.
LIMIT_S = 300
TIMED = ("images_per_s", "step_ms", "data_wait", "peak_mib", "slowest_rank")


@dataclass
class Tally:
    """What happened to one job."""

    name: str
    kills: dict[int, int] = field(default_factory=dict)
    """By rank."""
    inside_saves: int = 0
    """Kills that left an unfinished save behind, or came from a fault point of a save."""
    resumed: int = 0
    """Starts after a kill that continued (or began, where there was no checkpoint yet) by themselves."""
    runs: int = 0
    """Finished runs; all of them equal the straight one."""
    most_lost: int = 0
    """Steps between the last line of metrics and the checkpoint that was continued, at most."""
    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes of the ranks beside the killed one."""

    @property
    def total(self) -> int:
        return sum(self.kills.values())


def last_checkpoint(out: Path) -> Path:
    return out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()


def differences(out: Path, straight: Path) -> list[str]:
    """Names of tensors and lines of metrics that differ in any bit, but for times."""
    ours, theirs = (
        {
            f"{path.name}: {key}": tensor
            for path in last_checkpoint(o).glob("*.safetensors")
            for key, tensor in load_file(path).items()
        }
        for o in (out, straight)
    )
    assert any(name.startswith("model") for name in theirs) and any(name.startswith("optimizer") for name in theirs)
    found = sorted(ours.keys() ^ theirs.keys()) + [
        name for name in ours.keys() & theirs.keys() if not ours[name].equal(theirs[name])
    ]
    lines = [[{k: v for k, v in r.items() if k not in TIMED} for r in metrics(o)] for o in (out, straight)]
    return found if lines[0] == lines[1] else [*found, "metrics.jsonl"]


def unfinished(checkpoints: Path) -> bool:
    """Whether a save was under way."""
    return checkpoints.is_dir() and any("tmp" in p.name or "replaced" in p.name for p in checkpoints.iterdir())


def last_step(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().split("\n") if (out / "metrics.jsonl").exists() else []
    steps = [int(m[1]) for line in lines if line.endswith("}") and (m := re.match(r'\{"step": (\d+)', line))]
    return max(steps, default=0)


def storm(
    kills: int,
    root: Path,
    tallies: list[Tally],
    seed: int = 0,
    jobs: list[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Kills so many times; raises AssertionError at the first run that is not continued or not equal.

    Args:
        tallies: are filled as it goes on.
        jobs: names of those to run, all by default.
        progress: called after each kill with what was survived of this job.
    """
    rng = random.Random(seed)
    images = write_images(root / "images", 12)
    base = ["train", "--method", "mae", "--data", str(images), *TINY, "--steps", str(STEPS), "--save-every",
            str(SAVE_EVERY), "--warmup", "5", "--mae.decoder-width", "32", "--hang-after", "60"]  # fmt: skip
    server = Server(environment(), ROOT)
    try:
        for name, world, flags, share in JOBS:
            if jobs and name not in jobs:
                continue
            tallies.append(Tally(name))
            _storm_job(server, root, [*base, *flags], tallies[-1], world, max(1, round(share * kills)), rng, progress)
    finally:
        server.close()


def _storm_job(
    server: Server,
    root: Path,
    argv: list[str],
    tally: Tally,
    world: int,
    kills: int,
    rng: random.Random,
    progress: Callable[[str], None],
) -> None:
    name, folder = tally.name, root / re.sub(r"\W", "", tally.name)
    straight, out = folder / "straight", folder / "run"
    began = time.monotonic()
    server.run([*argv, "--out", str(straight)], world=world)
    length = time.monotonic() - began
    argv, was_killed = [*argv, "--out", str(out), "--resume", "auto"], False
    while True:
        reached = last_step(out)
        calm = tally.total >= kills
        point = rng.choice(list(POINTS)) if rng.random() < 0.5 else None
        victim = rng.randrange(world)
        if point is not None and point.startswith(("save", "log")):
            victim = 0  # who alone writes
        fault = (
            {} if point is None or calm else {"FASTMIM_FAULT": f"{point}:kill@{rng.randint(1, POINTS[point])}#{victim}"}
        )
        job = server.start(argv, world=world, **fault)
        if point is None and not calm:
            time.sleep(rng.uniform(0, length))
            if job.is_alive(victim):
                job.kill(victim)
        since = time.monotonic()
        codes = job.wait(LIMIT_S, grace_s=60)
        assert time.monotonic() - since < LIMIT_S, f"{argv}, {fault}: it hangs\n{job.said()}"
        if was_killed:
            said = job.said()
            resumed = re.search(r"resumed at step (\d+)", said)
            if resumed:
                tally.most_lost = max(tally.most_lost, reached - int(resumed[1]))
        if codes[victim] == -9:
            said = job.said()
            assert "Traceback" not in said and ("error:" not in said or "another process of the run is gone" in said), (
                said
            )
            tally.resumed += was_killed
            tally.kills[victim] = tally.kills.get(victim, 0) + 1
            tally.inside_saves += unfinished(out / "checkpoints") or (point or "").startswith("save")
            for rank, code in enumerate(codes):
                if rank != victim:
                    tally.codes[code] = tally.codes.get(code, 0) + 1
            was_killed = True
            progress(
                f"{name}: {tally.total} of {kills} kills, {tally.inside_saves} inside a save, {tally.runs} runs done"
            )
            continue
        assert codes == [0] * world, f"{argv}, {fault}: {codes}\n{job.said()}"
        tally.resumed += was_killed
        different = differences(out, straight)
        assert not different, f"{name}: {different[:5]}"
        assert not unfinished(out / "checkpoints"), "leftovers of killed saves"
        tally.runs, was_killed = tally.runs + 1, False
        if calm:
            return
        shutil.rmtree(out)


def table(tallies: list[Tally], seconds: float) -> str:
    lines = [
        "| job | kills of rank 0 | of another rank | of these inside a save | starts that went on by themselves "
        "| runs bit-equal to the straight run | most steps lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in tallies:
        others = t.total - t.kills.get(0, 0)
        lines.append(
            f"| {t.name} | {t.kills.get(0, 0)} | {others} | {t.inside_saves} | {t.resumed} of {t.total} "
            f"| {t.runs} of {t.runs} | {t.most_lost} (saved every {SAVE_EVERY}) |"
        )
    codes = {code: sum(t.codes.get(code, 0) for t in tallies) for code in sorted({c for t in tallies for c in t.codes})}
    lines.append(f"\n{sum(t.total for t in tallies)} kills in {seconds:.0f} s; exit codes of the ranks beside the killed one: "
                 + (", ".join(f"{code} ({n} times)" for code, n in codes.items()) or "none"))  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as scratch:
        start, result = time.monotonic(), []
        try:
            storm(wanted, Path(scratch), result, jobs=sys.argv[2:], progress=lambda text: print(text, flush=True))
        finally:
            # What was survived until then, if it was cut short.
            print(table(result, time.monotonic() - start), flush=True)
