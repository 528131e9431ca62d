"""Work that networks leave out without changing what they compute, but for rounding.

last     the last block gives queries, projection and MLP to the tokens that are predicted alone
first    the first block of a decoder normalizes and projects a mask token once per position, not once per image: it is
         the same vector with the same position everywhere

FASTMIM_SAVERS=all|off|first|last chooses among them when a network is built.
"""

import os

from fastmim.config import ConfigError, nearest

VARIABLE = "FASTMIM_SAVERS"
CHOICES = {"all": ("first", "last"), "off": (), "first": ("first",), "last": ("last",)}


def chosen() -> tuple[str, ...]:
    """The savers in use.

    Raises:
        ConfigError: the variable names none of the choices.
    """
    name = os.environ.get(VARIABLE) or "all"
    if name not in CHOICES:
        raise ConfigError(f"{VARIABLE}: expected one of {', '.join(CHOICES)}, got {name}{nearest(name, list(CHOICES))}")
    return CHOICES[name]
