"""Two hosts on one machine: network namespaces with an address, a name and a cable each; else two loopback addresses.

`python tests/multi_host/hosts.py` says which of the two is possible here.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

SIDES, STEM = ("a", "b"), "fastmim-host"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LOOPBACK = ("127.0.0.2", "127.0.0.3")
CABLE = "fastmim0"
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

    Args:
        loopback: do without namespaces.

    Attributes:
        reason: what they are, and why.
    """

    def __init__(self, *, loopback: bool = False) -> None:
        self.processes: list[subprocess.Popen] = []
        # Several tests may run on this machine at once.
        self.names = [f"{STEM}-{os.getpid()}-{side}" for side in SIDES]
        try:
            if loopback:
                raise OSError("as was asked for")
            self._make()
            self.reason = f"network namespaces {', '.join(self.names)} with {', '.join(ADDRESSES)}"
            self.hosts = [self._namespaced(*pair) for pair in zip(self.names, ADDRESSES)]
        except (subprocess.CalledProcessError, OSError) as e:
            self._remove()
            why = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
            self.reason = f"loopback addresses {', '.join(LOOPBACK)}: no network namespaces ({why})"
            env = {"GLOO_SOCKET_IFNAME": "lo"}
            self.hosts = [Host(name, address, [], env) for name, address in zip(self.names, LOOPBACK)]

    def _make(self) -> None:
        self._remove()
        a, b = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
        known = "".join(f"{address} {name}\n" for name, address in zip(self.names, ADDRESSES))
        for name, address in zip(self.names, ADDRESSES):
            (ETC / name).mkdir(parents=True)
            (ETC / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            _ip("-n", name, "link", "set", CABLE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        # A namespace may be had, and a host name of its own not.
        subprocess.run([*self._namespaced(a, ADDRESSES[0]).prefix, "true"], check=True, capture_output=True, text=True)

    def _namespaced(self, name: str, address: str) -> Host:
        renamed = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
        return Host(name, address, ["ip", "netns", "exec", name, *renamed], {"GLOO_SOCKET_IFNAME": CABLE})

    def _remove(self) -> None:
        """Ours, and those of tests that were killed."""
        if shutil.which("ip") is None:
            return
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        for name, pid in re.findall(rf"^({STEM}-(\d+)-\w)\b", listed, re.MULTILINE):
            if name in self.names or not Path(f"/proc/{pid}").exists():
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
        self._remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    two = Hosts()
    print(two.reason)
    two.close()
