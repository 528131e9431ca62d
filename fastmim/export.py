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
MODEL_FILE, PREFIX = "model.safetensors", "encoder."


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
    meta = manifest["meta"]
    encoder = _build(meta["config"]["method"], meta["model"], meta["encoder"])
    weights = load_file(folder / MODEL_FILE)
    encoder.load_state_dict({n.removeprefix(PREFIX): t for n, t in weights.items() if n.startswith(PREFIX)})
    return encoder


def _build(method: str, model: dict, design: dict) -> Encoder:
    """The encoder alone: the rest of its method may need files that are not at hand."""
    spec = from_plain(ModelSpec, model)
    return methods.find(method).METHOD.encoder_class(spec)(spec, **design)


def _from_file(path: Path) -> Encoder:
    try:
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
    except SafetensorError as e:
        raise ConfigError(f"{path}: expected a safetensors file: {e}") from e
    if description.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected a file that fastmim exported ({FORMAT}), got {description.get('format')}")
    encoder = _build(description["method"], json.loads(description["model"]), json.loads(description["design"]))
    encoder.load_state_dict(load_file(path))
    return encoder
