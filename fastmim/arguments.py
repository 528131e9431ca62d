"""argv -> TrainConfig: preset, then the run's own config on --resume, then --config files, then flags."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from fastmim.config import ConfigError, TrainConfig, nearest
from fastmim.methods.base import Preset, find
from fastmim.run_directory import CONFIG_FILE, newest_run
from fastmim.usage import parsed

# Inserted by launchers; the rank comes from the environment.
IGNORED = "--local_rank"
# Settings whose values YAML takes for truth values.
ON_OFF = ("compile", "graph")


def parse_train(argv: list[str], shared: Callable[[list[str]], list[str]] = list) -> TrainConfig:
    """The configuration of a training run.

    Args:
        argv: after `train`.
        shared: called with the words of the config of the run that is continued, if it is here; gives those of rank 0.

    Raises:
        ConfigError: unknown flag, preset or method, unreadable file, a value that cannot be parsed.
        SystemExit: --help.
    """
    argv = list(_normalized(argv))
    layers = [argv]
    files = _values(argv, "--config")
    argv[:] = _without(argv, "--config")
    out, resume = _value(argv, "--out"), _value(argv, "--resume")
    for file in files:
        layers.insert(0, _file_tokens(Path(file)))
    continued: list[str] = []
    if resume is not None:
        run = Path(out) if out is not None else newest_run(_value(list(chain(*layers)), "--method"))
        if run is not None and (run / CONFIG_FILE).is_file():
            continued = [*_without(_file_tokens(run / CONFIG_FILE), "--resume"), "--out", str(run)]
    layers.insert(0, shared(continued))
    flat = list(chain(*layers))
    method = _value(flat, "--method") or TrainConfig.method
    module = find(method)
    default = _with_preset(module.PRESETS, flat, method)
    for layer in layers[:-1]:
        layer[:] = [token.replace("--options.", f"--{method}.") for token in layer]
    flat = _one_length(layers)
    if _value(flat, "--steps") is not None and _value(flat, "--epochs") is None:
        default = dataclasses.replace(default, epochs=None)
    _check_flags(flat, module, method)
    return _parse(flat, default, method)


def parse_plain(plain: dict[str, Any]) -> TrainConfig:
    """The configuration that `to_plain` made plain, checked as if it had been typed."""
    method = plain["method"]
    return parse_train([token.replace("--options.", f"--{method}.") for token in _tokens(plain, "--")])


def flag_names(method: str) -> list[str]:
    """All flags of `fastmim train --method <method>`; a test freezes them."""
    names = [
        "--config",
        *(f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(TrainConfig) if f.name != "options"),
    ]
    return sorted(names + list(_option_flags(find(method).Config, f"--{method}")))


def _option_flags(config: type, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        name = f"{prefix}.{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(field.type):
            yield from _option_flags(field.type, name)
        else:
            yield name


def _normalized(argv: list[str]) -> Iterator[str]:
    """One token per word: splits --a=b, writes flags with hyphens, gives a bare --resume its value."""
    skip_value = False
    for i, token in enumerate(argv):
        if skip_value:
            skip_value = False
            continue
        if token.startswith(IGNORED) or token.startswith(IGNORED.replace("_", "-")):
            skip_value = "=" not in token
            continue
        if not token.startswith("--"):
            yield token
            continue
        name, equals, value = token.partition("=")
        yield name.replace("_", "-")
        if equals:
            yield value
        elif name == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            yield "latest"


def _values(argv: list[str], flag: str) -> list[str]:
    return [value for name, value in pairwise(argv) if name == flag]


def _value(argv: list[str], flag: str) -> str | None:
    """The last value given to a flag; None also for the word None."""
    values = _values(argv, flag)
    return values[-1] if values and values[-1] != "None" else None


def _without(argv: list[str], flag: str) -> list[str]:
    """argv less a flag and everything up to the next flag."""
    kept, dropping = [], False
    for token in argv:
        if token.startswith("--"):
            dropping = token == flag
        if not dropping:
            kept.append(token)
    return kept


def _file_tokens(path: Path) -> list[str]:
    """A YAML file of settings as the flags that say the same, so that one parser checks both."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"--config: cannot read {path}: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"--config: expected {path} to hold `name: value` lines, got {type(content).__name__}")
    return list(_tokens(content, "--"))


def _tokens(content: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in content.items():
        flag = prefix + str(key).replace("_", "-")
        if isinstance(value, dict):
            yield from _tokens(value, flag + ".")
        elif isinstance(value, bool) and key in ON_OFF:
            yield from (flag, "on" if value else "off")
        elif isinstance(value, bool):
            yield flag if value else f"{prefix}no-{flag.removeprefix(prefix)}"
        else:
            yield flag
            yield from (str(v) for v in (value if isinstance(value, list) else [value]))


def _one_length(layers: list[list[str]]) -> list[str]:
    """Joins the layers; a later --steps replaces an earlier --epochs and the other way round."""
    flat: list[str] = []
    for layer in layers:
        for given, other in (("--steps", "--epochs"), ("--epochs", "--steps")):
            if _value(layer, given) is not None:
                flat = _without(flat, other)
        for flag in {token for token in layer if token.startswith("--")}:
            flat = _without(flat, flag)
        flat += layer
    return flat


def _with_preset(presets: dict[str, Preset], flat: list[str], method: str) -> TrainConfig:
    name = _value(flat, "--preset") or ("paper" if _value(flat, "--data") else "demo")
    if name not in presets:
        raise ConfigError(f"--preset: expected one of {', '.join(presets)}, got {name}{nearest(name, list(presets))}")
    preset = presets[name]
    default = TrainConfig(method=method, preset=name, options=preset.options)
    default = dataclasses.replace(default, **preset.train)
    model = _value(flat, "--model") or default.model
    return dataclasses.replace(default, **preset.models.get(model, {}))


def _check_flags(flat: list[str], module: Any, method: str) -> None:
    known = flag_names(method)
    for token in flat:
        if token.startswith("--") and token != "--help" and re.sub(r"^--([\w.-]+\.)?no-", r"--\1", token) not in known:
            raise ConfigError(f"{token}: expected a known flag{nearest(token, known)}; see --help")


def _parse(flat: list[str], default: TrainConfig, method: str) -> TrainConfig:
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [
            ("train", Annotated[TrainConfig, tyro.conf.arg(name="")]),
            ("options", Annotated[type(default.options), tyro.conf.arg(name=method)]),
        ],
        frozen=True,
    )
    given = parsed(
        arguments,
        "fastmim train",
        flat,
        description=f"{TrainConfig.__doc__} Flags override --config FILE.yaml, which overrides the preset.",
        default=arguments(dataclasses.replace(default, options=None), default.options),
    )
    return dataclasses.replace(given.train, options=given.options)
