"""Two hosts on one machine: network namespaces with an address, a name and a cable each; else two loopback addresses.

`python tests/multi_host/hosts.py` says which of the two is possible here.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

NAMES = ("fastmim-a", "fastmim-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LOOPBACK = ("127.0.0.2", "127.0.0.3")
# What `ip netns exec` puts in the place of files of /etc. Source: ip-netns(8).
ETC = Path("/etc/netns")


class Host(NamedTuple):
    name: str
    address: str
    prefix: list[str]
    """What to put in front of a command so that it runs there."""
    env: dict[str, str]


class Hosts:
    """The two; to be closed.

    Attributes:
        reason: what they are, and why.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self._made = False
        try:
            self._make()
            self.reason = f"network namespaces {', '.join(NAMES)} with {', '.join(ADDRESSES)}"
            self.hosts = [self._namespaced(*pair) for pair in zip(NAMES, ADDRESSES)]
        except (subprocess.CalledProcessError, OSError) as e:
            self._remove()
            why = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
            self.reason = f"loopback addresses {', '.join(LOOPBACK)}: no network namespaces here ({why})"
            env = {"GLOO_SOCKET_IFNAME": "lo"}
            self.hosts = [Host(name, address, [], env) for name, address in zip(NAMES, LOOPBACK)]

    def _make(self) -> None:
        self._remove()
        for name in NAMES:
            _ip("netns", "add", name)
        self._made = True
        _ip("link", "add", "fastmim0", "netns", NAMES[0], "type", "veth", "peer", "name", "fastmim0", "netns", NAMES[1])
        known = "".join(f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES))
        for name, address in zip(NAMES, ADDRESSES):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "fastmim0")
            _ip("-n", name, "link", "set", "fastmim0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _namespaced(self, name: str, address: str) -> Host:
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
        return Host(name, address, ["ip", "netns", "exec", name, *renamed], {"GLOO_SOCKET_IFNAME": "fastmim0"})

    def _remove(self) -> None:
        if shutil.which("ip") is None:
            return
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(ETC / name, ignore_errors=True)

    def start(self, index: int, command: list[str], env: dict[str, str], cwd: Path, log: Path) -> subprocess.Popen:
        host = self.hosts[index]
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*host.prefix, *command], env=env | host.env, cwd=cwd, stdout=out, stderr=out, start_new_session=True
            )
        self.processes.append(process)
        return process

    def cut_power(self, process: subprocess.Popen) -> None:
        """Kills a launcher and all that it started."""
        import psutil

        front = psutil.Process(process.pid)
        for each in [front, *front.children(recursive=True)]:
            each.kill()
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._made:
            self._remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    two = Hosts()
    print(two.reason)
    two.close()
