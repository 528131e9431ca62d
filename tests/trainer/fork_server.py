"""Starts training processes by fork, after all imports: half a second each instead of five.

Run as a script it serves the requests of `Server`, one JSON line each. Its children are whole processes with sessions,
ranks and exit codes of their own; only the launcher and the imports are left out.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from trainer_run import free_port


class Ranks:
    """The processes of one job."""

    def __init__(self, server: "Server", pids: list[int], log: Path):
        self.server, self.pids, self.log = server, pids, log
        self.codes: list[int] | None = None

    def wait(self, limit_s: float = 240, grace_s: float = 120) -> list[int]:
        """Exit codes by rank (-N: ended by signal N).

        Args:
            limit_s: then what still runs is killed.
            grace_s: so long a rank may live after another one failed; launchers are like that.
        """
        if self.codes is None:
            self.codes = self.server.ask({"wait": self.pids, "limit_s": limit_s, "grace_s": grace_s})
        return self.codes

    def expect(self, code: int = 0) -> str:
        """Waits for the job, which all its processes must leave with `code`; returns what they said."""
        assert self.wait() == [code] * len(self.pids), self.said()
        return self.said()

    def is_running(self) -> bool:
        return any(map(self.is_alive, range(len(self.pids))))

    def is_alive(self, rank: int) -> bool:
        return self._state(rank) not in ("", "Z")

    def _state(self, rank: int) -> str:
        """Of the process, as proc(5) calls it; "" where there is none."""
        try:
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return ""

    def wait_until_held(self, rank: int = 0, limit_s: float = 240) -> None:
        """Until the rank has stopped itself, as its fault POINT:stop says: then it is where the test wants it."""
        end = time.monotonic() + limit_s
        while self._state(rank) != "T":
            assert self.is_alive(rank) and time.monotonic() < end, self.said()
            time.sleep(0.005)

    def go_on(self, rank: int = 0) -> None:
        self.kill(rank, signal.SIGCONT)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Signals one rank, and no other process of its session."""
        os.kill(self.pids[rank], number)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Server:
    """Its process must not outlive a failed test for long: it ends with its input, too."""

    def __init__(self, environment: dict[str, str], cwd: Path):
        self.logs = tempfile.TemporaryDirectory(prefix="fastmim-logs-")
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=cwd,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list[str], *, world: int = 1, **env: str) -> Ranks:
        """A job of `fastmim ARGV`, or of `--call MODULE FUNCTION ARGUMENTS`; environment variables may be given."""
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": free_port()} | env
        ranks = [{k: str(v) for k, v in ({"RANK": r, "LOCAL_RANK": r} | common).items()} for r in range(world)]
        log = Path(self.logs.name, str(self.count))
        self.count += 1
        return Ranks(self, self.ask({"argv": argv, "ranks": ranks, "log": str(log)}), log)

    def run(self, argv: list[str], *, world: int = 1, code: int = 0, **env: str) -> str:
        """A job from start to end: see `start` and `Ranks.expect`."""
        return self.start(argv, world=world, **env).expect(code)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.logs.cleanup()


def _child(argv: list[str], env: dict[str, str], log: str) -> None:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **env})
    code = 1
    try:
        from fastmim.boot import prepare_process
        from fastmim.cli import run

        prepare_process()
        if argv[0] == "--call":
            getattr(importlib.import_module(argv[1]), argv[2])(*argv[3:])
            code = 0
        else:
            code = run(argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], limit_s: float, grace_s: float) -> list[int]:
    end, codes = time.monotonic() + limit_s, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = -signal.SIGKILL
                    continue
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    if codes[pid]:
                        end = min(end, time.monotonic() + grace_s)
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def _serve() -> None:
    import fastmim_pipelines.folder  # noqa: F401
    import torch

    import fastmim.session  # noqa: F401
    from fastmim import cli
    from fastmim.engine.zero import import_deepspeed
    from fastmim.methods import base

    for name in base.available():
        base.find(name)
    import_deepspeed(torch.device("cpu"))
    # No launcher here ends the others with the first one: rank 0 has the time to say why.
    cli.GRACE_SECONDS = 0
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["limit_s"], request["grace_s"])
        else:
            answer = []
            for env in request["ranks"]:
                pid = os.fork()
                if pid == 0:
                    _child(request["argv"], env, request["log"])
                answer.append(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
