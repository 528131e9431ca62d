"""`fastmim zero-import`: weights and AdamW's moments out of a checkpoint that DeepSpeed itself wrote, of any ZeRO stage.

Those files are pickles that name DeepSpeed's classes. They are read by the reader for foreign weights: names mean inert
stand-ins, nothing is run, and deepspeed need not be installed.
Source of the layout: DeepSpeed 0.19.8, runtime/engine.py `save_checkpoint` and utils/zero_to_fp32.py.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch import Tensor

from fastmim.checkpoint import write_tensors
from fastmim.config import ConfigError
from fastmim.engine.base import MODEL_FILE, OPTIMIZER_FILE
from fastmim.tokenizer.pickled import PICKLE_ERRORS, Inert, Reader, Storage, View, rebuild_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
INERT_MODULES = ("deepspeed", "argparse")
# Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(class, name): here that looks nothing up.
INERT_NAMES = {
    ("__builtin__", "getattr"), ("builtins", "getattr"), ("torch", "Tensor"),
    *(("torch", str(t).removeprefix("torch.")) for t in (torch.float32, torch.float16, torch.bfloat16)),
}  # fmt: skip


def zero_import(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
) -> None:
    """Write the fp32 weights and AdamW's moments of a DeepSpeed checkpoint as safetensors, without unpickling it.

    Args:
        folder: What was given to `save_checkpoint` (with the file `latest`), or one of its global_step folders.
        out: New folder for model.safetensors and, if there are moments, optimizer.safetensors.
    """
    if out.exists():
        raise ConfigError(f"zero-import: expected {out} not to exist; name another folder")
    found = read_checkpoint(folder)
    shared = _shared_prefix(list(found.weights))
    out.mkdir(parents=True)
    write_tensors(out / MODEL_FILE, {name.removeprefix(shared): t for name, t in found.weights.items()})
    if found.moments:
        optimizer = {f"{kind}.{name.removeprefix(shared)}": t for (kind, name), t in found.moments.items()}
        write_tensors(out / OPTIMIZER_FILE, optimizer)
    count = sum(t.numel() for t in found.weights.values())
    moments = f", and the moments of {len(found.moments) // len(MOMENTS)}" if found.moments else ", no moments"
    print(
        f"done      {out}: {len(found.weights)} tensors, {count / 1e6:.2f} M numbers, of ZeRO stage {found.stage} on "
        f"{found.ranks} ranks, step {found.step}{moments}{f'; the prefix {shared} was dropped' if shared else ''}"
    )


class Found(NamedTuple):
    """What a checkpoint of DeepSpeed holds."""

    weights: dict[str, Tensor]
    moments: dict[tuple[str, str], Tensor]
    """By kind (exp_avg, exp_avg_sq) and parameter."""
    stage: int
    ranks: int
    step: int


class SizeError(Exception):
    """The tensors of a group take more or fewer numbers than there are."""


class ZeroReader(Reader):
    """Also knows the names that DeepSpeed's own files use."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_from_type
        if (module, name) in INERT_NAMES or module.partition(".")[0] in INERT_MODULES:
            return Inert
        return super().find_class(module, name)


def _rebuild_from_type(function: Callable, kind: type, arguments: tuple, state: Any) -> View:
    if function is not rebuild_tensor:
        raise pickle.UnpicklingError("a tensor that is rebuilt by another function than torch's")
    return rebuild_tensor(*arguments)


def read_file(path: Path) -> dict:
    """The object in a file of `torch.save`, with its tensors; objects of other classes are stand-ins.

    Raises:
        ConfigError: damaged, or it asks for something that has no place there.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            index = next((n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")), None)
            if index is None:
                raise pickle.UnpicklingError("the archive has no data.pkl")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise pickle.UnpicklingError("the archive is compressed, which torch.save never does")
            root = index.removesuffix("data.pkl")
            loaded = ZeroReader(io.BytesIO(archive.read(index))).load()
            data: dict[str, bytearray] = {}

            def tensor(view: View) -> Tensor:
                storage: Storage = view.storage
                if storage.key not in data:
                    name = f"{root}data/{storage.key}"
                    if archive.getinfo(name).file_size != storage.num_bytes:
                        raise pickle.UnpicklingError(f"{name} has another size than the index says")
                    data[storage.key] = bytearray(archive.read(name))
                return view.tensor(data[storage.key])

            found = _with_tensors(loaded, tensor, {})
    except (*PICKLE_ERRORS, zipfile.BadZipFile, OSError) as e:
        raise ConfigError(f"{path}: expected a file of a DeepSpeed checkpoint: {e or type(e).__name__}") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a file of a DeepSpeed checkpoint, got a {type(found).__name__} in it")
    return found


def _with_tensors(value: Any, tensor: Callable[[View], Tensor], done: dict[int, Any]) -> Any:
    """The same with tensors in the place of views; what occurs twice is done once, however a file nests it."""
    if isinstance(value, View):
        return tensor(value)
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in done:
        done[id(value)] = None  # in itself it has no place
        if isinstance(value, dict):
            done[id(value)] = {key: _with_tensors(item, tensor, done) for key, item in value.items()}
        else:
            done[id(value)] = [_with_tensors(item, tensor, done) for item in value]
    return done[id(value)]


def read_checkpoint(folder: Path) -> Found:
    """Weights (fp32) and moments by parameter name, put together from all ranks' files.

    Raises:
        ConfigError: no such checkpoint, ranks are missing, or sizes do not fit.
    """
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(errors="replace").strip()
        if tag in ("", ".", "..") or "/" in tag or not (folder / tag).is_dir():
            raise ConfigError(f"{latest}: expected the name of a folder beside it, got {tag!r}")
        folder = folder / tag
    models, optimizers = _by_rank(folder, "model_states"), _by_rank(folder, "optim_states")
    if not models:
        raise ConfigError(f"{folder}: expected *_model_states.pt files of DeepSpeed, got none")
    if any("mp_rank_00" not in path.name for path in [*models, *optimizers]):
        raise ConfigError(f"{folder}: expected no model parallelism, got files of more than one part of the model")
    model = read_file(models[0])
    step = int(model.get("global_steps") or 0)
    if not optimizers:
        return _unsharded(model, step)
    try:
        states = [read_file(path)["optimizer_state_dict"] for path in optimizers]
        counts = states[0]["partition_count"]
        ranks = max(counts) if isinstance(counts, list) else int(counts)
        is_stage_3 = "fp32_flat_groups" in states[0]
        for what, files in (
            (("optimizer", optimizers), ("model", models)) if is_stage_3 else (("optimizer", optimizers),)
        ):
            if len(files) != ranks:
                raise ConfigError(f"{folder}: expected the {what} states of {ranks} ranks, got {len(files)} files")
        if is_stage_3:
            rest = [model, *(read_file(path) for path in models[1:])]
            return Found(*_stage_3(rest, states), 3, ranks, step)
        stage = int(model["ds_config"]["zero_optimization"]["stage"])
        return Found(*_stages_1_2(model, states), stage, ranks, step)
    except SizeError as e:
        raise ConfigError(f"{folder}: {e}; a file is damaged, or of another checkpoint") from e
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"{folder}: expected the layout of DeepSpeed's checkpoints, did not find {e}") from e


def _by_rank(folder: Path, what: str) -> list[Path]:
    """Files of a kind in the order of their ranks."""

    def order(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(match[1]) if match else 0

    return sorted(folder.glob(f"*{what}.pt"), key=order)


def _unsharded(model: dict, step: int) -> Found:
    """Stage 0: the optimizer is in the model's file, its parameters are numbered."""
    weights = {name: _fp32(tensor) for name, tensor in model["module"].items()}
    return Found(weights, {}, 0, 1, step)


def _stages_1_2(model: dict, states: list[dict]) -> tuple[dict, dict]:
    """Each group of parameters is one flat tensor, cut into equal parts, one per rank."""
    weights, moments = _unpartitioned(model), {}
    for group, shapes in enumerate(model["param_shapes"]):
        padding = states[0].get("param_alignment_paddings")
        gaps = padding[group] if padding else [0] * len(shapes)
        flat = torch.cat([state["single_partition_of_fp32_groups"][group] for state in states])
        weights |= dict(_cut(flat, shapes, gaps, len(states)))
        for kind in MOMENTS:
            parts = [state["base_optimizer_state"]["state"].get(group, {}).get(kind) for state in states]
            if all(isinstance(part, Tensor) for part in parts):
                moments |= {(kind, name): t for name, t in _cut(torch.cat(parts), shapes, gaps, len(parts))}
    return _with_shared(weights, model), moments


def _cut(flat: Tensor, shapes: dict[str, tuple], gaps: list[int], ranks: int) -> Iterator[tuple[str, Tensor]]:
    # The end is padded to a multiple of twice the ranks. Source: utils/zero_to_fp32.py, zero2_align.
    _expect(sum(torch.Size(shape).numel() for shape in shapes.values()) + sum(gaps), flat.numel(), 2 * ranks, shapes)
    at = 0
    for (name, shape), gap in zip(shapes.items(), gaps):
        count = torch.Size(shape).numel()
        yield name, flat[at : at + count].view(shape).clone()
        at += count + gap


def _expect(needed: int, found: int, alignment: int, shapes: dict[str, tuple]) -> None:
    if -(-needed // alignment) != -(-found // alignment):
        names = list(shapes)
        raise SizeError(f"expected {needed} numbers for {names[0]} to {names[-1]}, got {found}")


def _stage_3(models: list[dict], states: list[dict]) -> tuple[dict, dict]:
    """Each parameter is cut into equal parts, the last one padded; a rank's parts are joined group by group."""
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
    buffers = set(models[0]["buffer_names"])
    # The parameters in there are placeholders.
    weights = {name: _fp32(tensor) for name, tensor in models[0]["module"].items() if name in buffers}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        flat, count = (
            torch.cat([model["frozen_param_fragments"][name].flatten() for model in models]),
            torch.Size(shape).numel(),
        )
        if len(flat) < count:
            raise SizeError(f"{name}: expected {count} numbers, got {len(flat)}")
        weights[name] = _fp32(flat[:count].view(shape))
    weights |= dict(_joined([torch.cat(state["fp32_flat_groups"]) for state in states], shapes))
    moments = {}
    for kind in MOMENTS:
        groups = [state["optimizer_state_dict"]["state"] for state in states]
        if all(kind in group for state in groups for group in state.values()) and groups[0]:
            flats = [torch.cat([state[key][kind] for key in sorted(state)]) for state in groups]
            moments |= {(kind, name): t for name, t in _joined(flats, shapes)}
    return _with_shared(weights, models[0]), moments


def _joined(flats: list[Tensor], shapes: dict[str, tuple]) -> Iterator[tuple[str, Tensor]]:
    parts = [-(-torch.Size(shape).numel() // len(flats)) for shape in shapes.values()]
    for flat in flats:
        _expect(sum(parts), flat.numel(), 1, shapes)
    at = 0
    for (name, shape), part in zip(shapes.items(), parts):
        count = torch.Size(shape).numel()
        yield name, torch.cat([flat[at : at + part] for flat in flats])[:count].view(shape).clone()
        at += part


def _unpartitioned(model: dict) -> dict[str, Tensor]:
    """What stages 1 and 2 leave whole: buffers, frozen parameters, and the trained ones in the precision of the products."""
    whole = model["module"] | (model.get("frozen_param_fragments") or {})
    return {name: _fp32(tensor) for name, tensor in whole.items()}


def _fp32(tensor: Tensor) -> Tensor:
    """Counts stay what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _with_shared(weights: dict[str, Tensor], model: dict) -> dict[str, Tensor]:
    shared = (model.get("shared_params") or {}).items()
    return weights | {alias: weights[name].clone() for alias, name in shared if name in weights}


def _shared_prefix(names: list[str]) -> str:
    """Leading parts that all names have, as `module.` of a wrapper."""
    shared = ""
    while names and all("." in name[len(shared) :] for name in names):
        head = names[0][: names[0].index(".", len(shared)) + 1]
        if not all(name.startswith(head) for name in names):
            break
        shared = head
    return shared
