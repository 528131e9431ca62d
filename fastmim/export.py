"""The encoder alone, for use elsewhere: written, and read back from any of our files."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastmim import checkpoint
from fastmim.config import ConfigError, ModelSpec, from_plain, to_plain
from fastmim.methods import base as methods
from fastmim.vit import Encoder

FORMAT = "fastmim-encoder-2"
MODEL_FILE = "model.safetensors"


def write_encoder(encoder: Encoder, method: str, path: Path) -> None:
    """Writes the encoder's weights, fp32, with what a reader needs to rebuild it in the file's header."""
    description = {
        "format": FORMAT, "method": method, "model": json.dumps(to_plain(encoder.model)),
        "design": json.dumps(encoder.design), "patch_order": "row, column, channel",
    }  # fmt: skip
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, path, metadata=description)


def load_encoder(path: Path) -> Encoder:
    """The encoder in an `encoder.safetensors`, in a checkpoint folder, or in the newest checkpoint of a run.

    Raises:
        ConfigError: not one of these.
        CheckpointError: a checkpoint whose files do not match its manifest.
    """
    if path.is_file():
        return _from_file(path)
    if (path / "checkpoints").is_dir():
        folder, manifest = checkpoint.find(path / "checkpoints", None, print)
    elif (path / checkpoint.MANIFEST).is_file():
        folder, manifest = path, checkpoint.verify(path)
    else:
        raise ConfigError(f"{path}: expected an encoder.safetensors, a checkpoint folder or a run, got none of them")
    saved = manifest["meta"]["config"]
    options = from_plain(methods.find(saved["method"]).Config, saved["options"])
    spec = from_plain(ModelSpec, manifest["meta"]["model"])
    method = methods.build(saved["method"], spec, options, saved["seed"])
    method.load_state_dict(load_file(folder / MODEL_FILE))
    return method.encoder


def _from_file(path: Path) -> Encoder:
    try:
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
    except SafetensorError as e:
        raise ConfigError(f"{path}: expected a safetensors file: {e}") from e
    if description.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected a file that fastmim exported ({FORMAT}), got {description.get('format')}")
    spec = from_plain(ModelSpec, json.loads(description["model"]))
    make_encoder = methods.find(description["method"]).METHOD.encoder_class(spec)
    encoder = make_encoder(spec, **json.loads(description["design"]))
    encoder.load_state_dict(load_file(path))
    return encoder
