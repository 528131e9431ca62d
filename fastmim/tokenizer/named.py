"""Tokenizers by what `--cae.tokenizer` says: a file of the d-VAE's weights, or a function that makes another one."""

import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

from fastmim.config import ConfigError, ModelSpec
from fastmim.tokenizer.target import Tokenizer, image_size
from fastmim.tokenizer.weights import load_dalle

# package.module:function, which no file of weights looks like.
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function(name: str) -> bool:
    return FUNCTION.fullmatch(name) is not None


def load_tokenizer(name: str, model: ModelSpec) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: a file for `load_dalle`, or `package.module:function`. The function (or class) is called without arguments
            and gives an nn.Module as `Tokenizer` describes it; modules are looked for in the working directory, too.
        model: whose patches it shall name.

    Raises:
        ConfigError: no such file or function, or what it makes does not give token ids of the model's images.
    """
    flag = f"--cae.tokenizer {name}"
    if not is_function(name):
        network = load_dalle(Path(name))
        if network.channels != model.in_chans:
            raise ConfigError(
                f"--in-chans: expected {network.channels}, which the tokenizer {name} takes, got {model.in_chans}; or use "
                f"--cae.target pixel"
            )
        return network
    # Weights are weights under an outer `with torch.device("meta")`, too; and those of the method depend on the seed alone.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        network = _made(flag, name)
        _try(flag, network, model)
    return network


def _made(flag: str, name: str) -> Tokenizer:
    module, _, function = name.partition(":")
    # Commands have their own folder there, not the one that the user works in.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        network = getattr(importlib.import_module(module), function)()
    # It is the user's code: whatever it raises is its error.
    except Exception as e:
        raise ConfigError(f"{flag}: expected a function that makes a tokenizer: {type(e).__name__}: {e}") from e
    for wanted in ("vocabulary", "stride"):
        value = getattr(network, wanted, None)
        if not isinstance(network, nn.Module) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{flag}: expected an nn.Module whose `{wanted}` is a positive integer, got {type(network).__name__} with "
                f"{value}"
            )
    return network


@torch.no_grad()
def _try(flag: str, network: Tokenizer, model: ModelSpec) -> None:
    """One grey image: wrong ids would end a run in a kernel, or train it to nonsense."""
    shape, wanted = (1, model.in_chans, *image_size(network, model)), torch.tensor([[0, model.num_patches - 1]])
    try:
        ids = network.eval()(torch.full(shape, 0.5), wanted)
    except Exception as e:
        raise ConfigError(f"{flag}: expected ids of images {shape}: {type(e).__name__}: {e}") from e
    got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
    if got != f"{tuple(wanted.shape)} torch.int64":
        raise ConfigError(f"{flag}: expected ids (1, 2) torch.int64 of two patches of an image, got {got}")
    low, high = ids.aminmax()
    if low < 0 or high >= network.vocabulary:
        raise ConfigError(f"{flag}: expected ids in 0 .. {network.vocabulary - 1}, got {int(low)} .. {int(high)}")
