"""Optional packages: imported when used, with the line that installs them when they are missing."""

import importlib
from types import ModuleType

from fastmim.config import ConfigError


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`, which the extra `extra` installs.

    Raises:
        ConfigError: if it is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module.partition(".")[0]:
            raise
        raise ConfigError(f"{module} is not installed: pip install 'fastmim[{extra}]'") from e
