"""Words of a command line -> what a command takes, by tyro; a mistake is one line like all others, and not tyro's box."""

import functools
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from itertools import groupby
from typing import Any

import tyro

from fastmim.config import ConfigError

# What boxes are drawn with, where that can be shown; else rules are hyphens, and sides blanks. And colors.
FRAME, COLOR = "─│╭╮╰╯ ", re.compile(r"\x1b\[[\d;]*m")


def parsed(target: Any, prog: str, argv: Sequence[str], **options: Any) -> Any:
    """What `tyro.cli` makes of the words.

    Args:
        target: a dataclass, or a function, which must not print: its standard error is taken for tyro's.
        options: of tyro.cli.

    Raises:
        ConfigError: a value is missing, or of another type.
        SystemExit: --help.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(target, prog=prog, args=argv, **options)
    except SystemExit as e:
        if not e.code:
            raise
        raise ConfigError(f"{one_line(said.getvalue())}; see {prog} --help") from None


def call(action: Callable, prog: str, argv: Sequence[str]) -> Any:
    """Calls a function, whose parameters are the options of a command."""

    @functools.wraps(action)
    def bound(*args: Any, **kwargs: Any) -> Callable:
        return functools.partial(action, *args, **kwargs)

    return parsed(bound, prog, argv)()


def one_line(box: str) -> str:
    """The first paragraph of the text in tyro's box, below its title."""
    rows = [COLOR.sub("", row).strip(FRAME) for row in box.splitlines()[1:]]
    paragraphs = (list(group) for has_text, group in groupby(rows, lambda row: bool(row.strip("-"))) if has_text)
    text = " ".join(next(paragraphs, ["wrong usage"])).rstrip(".")
    return re.sub(r"^Error parsing (\S+?):? ", r"\1: ", text)
