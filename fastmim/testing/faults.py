"""Faults on order: `FASTMIM_FAULT="save:rename:kill@3"` kills the process at its third rename of a save.

A fault is `POINT:ACTION`, then, each if wanted, `=VALUE`, `@N` (the N-th time; `@N+`: from then on; `@N-M`), `#RANK`;
several are separated by commas. A fault is a function of that text, so that a failure can be had again. Without the
variable nothing is imported from here: the points are functions of the trainer, which are wrapped when there is a fault.
"""

import errno
import importlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastmim.config import ConfigError, nearest

VARIABLE = "FASTMIM_FAULT"
# Point -> functions at whose start the fault happens.
POINTS = {
    "save:begin": ("fastmim.checkpoint:prepare",),
    "save:write": ("fastmim.checkpoint:write",),
    "save:fsync": ("fastmim.checkpoint:fsync",),
    "save:rename": ("fastmim.checkpoint:rename",),
    "save:latest": ("fastmim.checkpoint:replace",),
    "save:delete": ("fastmim.checkpoint:remove",),
    "load:verify": ("fastmim.checkpoint:verify",),
    "load:read": ("fastmim.saving:Stored.get",),
    "step:data": ("fastmim_pipelines.loader:CropLoader._account",),
    "step:forward": ("fastmim.step:StepProgram.forward",),
    "step:backward": ("fastmim.engine.single:SingleEngine.backward", "fastmim.engine.zero:ZeroEngine.backward"),
    "step:update": ("fastmim.trainer:Trainer._settle",),
    "step:optimizer": ("fastmim.engine.single:SingleEngine.step", "fastmim.engine.zero:ZeroEngine.step"),
    "evaluate": ("fastmim.observing:Observer.knn",),
    "log:write": ("fastmim.metrics:MetricsFile.write",),
}
SIGNALS = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT,
    "usr1": signal.SIGUSR1, "segv": signal.SIGSEGV,
}  # fmt: skip
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "eintr": errno.EINTR}
NUMBERS = {"nan": float("nan"), "inf": float("inf")}
ACTIONS = (*SIGNALS, *ERRORS, *NUMBERS, "abort", "exit", "sleep", "raise", "scale")
GRAMMAR = re.compile(r"(?P<point>[a-z]+(?::[a-z]+)?):(?P<action>[a-z0-9]+)(?:=(?P<value>[\d.]+))?"
                     r"(?:@(?P<first>\d+)(?:(?P<open>\+)|-(?P<last>\d+))?)?(?:#(?P<rank>\d+))?")  # fmt: skip


class InjectedError(Exception):
    """What the action `raise` raises."""


@dataclass
class Fault:
    point: str
    action: str
    value: float = 1.0
    first: int = 1
    last: float = 1
    rank: int | None = None
    count: int = 0

    def is_due(self) -> bool:
        """Counts a passage of the point."""
        self.count += 1
        is_mine = self.rank is None or self.rank == int(os.environ.get("RANK", "0"))
        return is_mine and self.first <= self.count <= self.last


def parse(text: str) -> list[Fault]:
    """The faults that a text describes.

    Raises:
        ConfigError: unknown point or action, or another grammar.
    """
    faults = []
    for part in text.split(","):
        match = GRAMMAR.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{VARIABLE}: expected POINT:ACTION[=VALUE][@N|@N+|@N-M][#RANK], got {part!r}")
        for name, choices in (("point", list(POINTS)), ("action", list(ACTIONS))):
            if match[name] not in choices:
                known = f"expected one of {', '.join(choices)}, got {match[name]}{nearest(match[name], choices)}"
                raise ConfigError(f"{VARIABLE}: {name}: {known}")
        first = int(match["first"] or 1)
        last = float("inf") if match["open"] else int(match["last"] or first)
        rank = None if match["rank"] is None else int(match["rank"])
        faults.append(Fault(match["point"], match["action"], float(match["value"] or 1), first, last, rank))
    return faults


def install(text: str) -> None:
    """Wraps the functions of the points that the faults need."""
    faults = parse(text)
    for point in dict.fromkeys(fault.point for fault in faults):
        mine = [fault for fault in faults if fault.point == point]
        for place in POINTS[point]:
            module, _, path = place.partition(":")
            owner: Any = importlib.import_module(module)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, name, _faulty(getattr(owner, name), mine))
    print(f"faults    {text}, as {VARIABLE} asks", flush=True)


def _faulty(function: Callable, faults: list[Fault]) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        due = [fault for fault in faults if fault.is_due()]
        for fault in due:
            args = _strike(fault, args)
        result = function(*args, **kwargs)
        for fault in due:
            if fault.point == "step:forward" and (factor := _factor(fault)) is not None:
                result = result._replace(loss=result.loss * factor)
        return result

    return wrapper


def _strike(fault: Fault, args: tuple) -> tuple:
    """Does what is due before the function runs; returns the arguments for it."""
    action = fault.action
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action in ERRORS:
        if fault.point == "save:write":
            file, data, *_ = args
            file.write(data[: len(data) // 2])
            file.flush()
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]))
    elif action == "abort":
        os.abort()
    elif action == "exit":
        os._exit(int(fault.value))
    elif action == "sleep":
        time.sleep(fault.value)
    elif action == "raise":
        raise InjectedError(f"{VARIABLE}: {fault.point}")
    elif fault.point == "step:backward":
        engine, loss = args
        factor = _factor(fault)
        # The loss stays as it is; its gradient does not.
        loss = loss.view_as(loss)
        loss.register_hook(lambda gradient: gradient * factor)
        return engine, loss
    return args


def _factor(fault: Fault) -> float | None:
    return fault.value if fault.action == "scale" else NUMBERS.get(fault.action)
