"""The published weights of the d-VAE encoder."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastmim.config import ConfigError
from fastmim.tokenizer.dalle import DalleEncoder
from fastmim.tokenizer.pickled import read_tensors

# Source: openai/DALL-E notebooks/usage.ipynb.
PUBLISHED = "https://cdn.openai.com/dall-e/encoder.pkl"
# The same network under the names of facebook/flava-image-codebook (transformers modeling_flava.py `FlavaImageCodebook`).
OTHER_NAMES = {".group.block_": ".block_", ".res_path.path.": ".res_path.", ".weight": ".w", ".bias": ".b"}


def load_dalle(path: Path) -> DalleEncoder:
    """The d-VAE encoder from OpenAI's encoder.pkl, from a state dict that torch saved, or from a .safetensors file.

    The pickle is read without running what it says (see pickled.py). Sizes are taken from the weights.

    Raises:
        ConfigError: no such file, or not the weights of this network.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer: expected the file {path}, got none there; download {PUBLISHED}, or give package.module:function"
        )
    # Under an outer `with torch.device("meta")`, too: the weights are read, and so checked, before a run starts.
    with torch.device("cpu"):
        if path.suffix == ".safetensors":
            try:
                tensors = load_file(path)
            except SafetensorError as e:
                raise ConfigError(f"{path}: expected a safetensors file: {e}") from e
        else:
            tensors = read_tensors(path)
        return _network(path, {_name(name): tensor for name, tensor in tensors.items()})


def _name(name: str) -> str:
    for theirs, ours in OTHER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _network(path: Path, tensors: dict[str, Tensor]) -> DalleEncoder:
    first, last = tensors.get("blocks.input.w"), tensors.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        names = ", ".join(sorted(tensors)[:3]) or "no tensor"
        raise ConfigError(
            f"{path}: expected the d-VAE encoder with blocks.input.w and blocks.output.conv.w, got {names}"
        )
    width, channels = first.shape[:2]
    blocks = sum(name.startswith("blocks.group_1.") and name.endswith(".conv_1.w") for name in tensors)
    # Without memory and random numbers: the weights of the method's networks depend on the seed alone.
    with torch.device("meta"):
        network = DalleEncoder(channels, width, max(1, blocks), len(last))
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [n for n in expected | tensors if n not in tensors or expected.get(n) != tensors[n].shape]
    if wrong:
        name = wrong[0]
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        shape = tuple(expected[name]) if name in expected else "nothing"
        raise ConfigError(f"{path}: expected the d-VAE encoder with {name} {shape}, got {got}")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of names and weights: equal for equal tokenizers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
