"""Token ids that were computed beforehand, so that further runs on the same crops do without the tokenizer.

Random crops and flips are functions of the seed, the step and the sample, so runs with the same data, batch size and
seed see the same pixels, and what the tokenizer says of them can be kept: for comparing settings, half of CAE's forward
pass. A recording takes 2 bytes per patch, image and step: 392 bytes at 14 x 14, 75 GB for 150 epochs of ImageNet.

It is a folder of `tokens.npy`, one record per image and step (sample id, checksum of the crop, ids of all patches), and
`tokens.json`, its description, which is written last: a recording that was cut short is not taken for a whole one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastmim_pipelines.spec import Batch, CropSpec, Loader
from torch import Tensor, nn

from fastmim.config import ConfigError, ModelSpec
from fastmim.tokenizer.target import TokenTarget
from fastmim.tokenizer.weights import fingerprint
from fastmim.views import random_flip

FORMAT = "fastmim-tokens-1"
RECORDS, HEADER = "tokens.npy", "tokens.json"
# int16 holds them.
LARGEST_VOCABULARY = 1 << 15


def record_tokens(
    folder: Path, loader: Loader, network: nn.Module, model: ModelSpec, *, seed: int, steps: range, device: torch.device
) -> None:
    """Writes the token ids of all images of some steps.

    Args:
        folder: where to; must not hold a recording yet.
        loader: of one process with the global batch, for the crops of `CAE(model, config).crops`: the model's, the
            tokenizer's.
        network: the tokenizer.
        model: of the run; its grid is recorded, and the checksum takes its crop.
        seed: of the run and of the loader.
        steps: consecutive ones, from the start of any of them.
        device: where to compute.

    Raises:
        ConfigError: the folder has a recording, there is no step, or the vocabulary is too large.
    """
    if network.vocabulary > LARGEST_VOCABULARY:
        raise ConfigError(f"tokens: expected a vocabulary of at most {LARGEST_VOCABULARY}, got {network.vocabulary}")
    if not steps:
        raise ConfigError(f"tokens: expected at least one step to record, got {steps.start}..{steps.stop - 1}")
    if (folder / HEADER).exists():
        raise ConfigError(f"tokens: {folder} holds a recording already; delete it or take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    target, records = TokenTarget(network, model), None
    for row, (step, batch) in enumerate(_batches(loader, steps, device)):
        rng = torch.tensor([seed, step], device=device)
        tokens = target(batch, rng, random_flip(rng, batch.ids), None)
        if records is None:
            shape = (len(steps), len(batch.ids))
            kind = record_type(model.num_patches)
            records = np.lib.format.open_memmap(folder / RECORDS, mode="w+", dtype=kind, shape=shape)
        records[row]["id"] = batch.ids.cpu().numpy()
        records[row]["checksum"] = checksum(batch.crops[0], model.patch_size).cpu().numpy()
        records[row]["tokens"] = tokens.cpu().numpy()
    records.flush()
    description = {
        "format": FORMAT, "seed": seed, "first_step": steps.start, "grid": list(model.grid),
        "vocabulary": network.vocabulary, "tokenizer": fingerprint(network),
    }  # fmt: skip
    (folder / HEADER).write_text(json.dumps(description))


def _batches(loader: Loader, steps: range, device: torch.device) -> Iterator[tuple[int, Batch]]:
    epoch, offset = divmod(steps.start, loader.steps_per_epoch)
    step = steps.start
    while step < steps.stop:
        for batch in loader.epoch(epoch, offset):
            if step == steps.stop:
                return
            yield step, Batch(tuple(crop.to(device) for crop in batch.crops), batch.ids.to(device))
            step += 1
        epoch, offset = epoch + 1, 0


def record_type(num_patches: int) -> np.dtype:
    return np.dtype([("id", "<i8"), ("checksum", "<i8"), ("tokens", "<i2", (num_patches,))])


def checksum(images: Tensor, patch_size: int) -> Tensor:
    """(B,) int64 of one pixel per patch of uint8 (B, C, H, W): tells other crops and other decoders apart."""
    values = images[:, :, patch_size // 2 :: patch_size, patch_size // 2 :: patch_size].flatten(1).long()
    # Powers of an odd number modulo 2**64 (Knuth's multiplier): every value and its place matter.
    factors = torch.full_like(values[0], 6364136223846793005).cumprod(0)
    return (values * factors).sum(1)


class RecordedTarget:
    """Token ids out of a recording, in the place of `TokenTarget`; needs no crop of its own.

    Looking up a step means that the host reads ids, step and checksums from the device, once per micro-batch: on a GPU
    the only wait of a forward pass, against half of its work.

    Raises:
        ConfigError: no recording, or one for another grid or tokenizer.
    """

    def __init__(self, folder: Path, model: ModelSpec, network: nn.Module | None = None):
        self.folder, self.model = Path(folder), model
        try:
            self.description: dict[str, Any] = json.loads((self.folder / HEADER).read_text())
            self.records = np.load(self.folder / RECORDS, mmap_mode="r")
        except (OSError, ValueError) as e:
            raise ConfigError(f"tokens: expected a finished recording in {folder}: {e}") from e
        self._expect("format", FORMAT)
        self._expect("grid", list(model.grid))
        if network is not None:
            self._expect("tokenizer", fingerprint(network))
        self.vocabulary = self.description["vocabulary"]

    def _expect(self, name: str, value: object) -> None:
        if self.description.get(name) != value:
            raise ConfigError(f"tokens: {self.folder}: expected {name} {value}, got {self.description.get(name)}")

    def crops(self, scale: tuple[float, float]) -> tuple[CropSpec, ...]:
        return ()

    @torch.no_grad()
    def __call__(self, batch: Batch, rng: Tensor, flip: Tensor, ids: Tensor | None) -> Tensor:
        """As `TokenTarget`.

        Raises:
            ConfigError: the recording is of another seed, ends before this step, or was made from other crops.
        """
        count = len(batch.ids)
        read = torch.cat([rng, batch.ids, checksum(batch.crops[0], self.model.patch_size)]).cpu().numpy()
        (seed, step), samples, sums = read[:2], read[2 : 2 + count], read[2 + count :]
        self._expect("seed", int(seed))
        first = self.description["first_step"]
        if not first <= step < first + len(self.records):
            last = first + len(self.records) - 1
            raise ConfigError(f"tokens: {self.folder}: expected step {step}, got a recording of {first}..{last}")
        records = self.records[step - first]
        order = np.argsort(records["id"])
        places = order[np.searchsorted(records["id"], samples, sorter=order).clip(max=len(order) - 1)]
        found = records[places]
        for name, wanted in (("id", samples), ("checksum", sums)):
            wrong = found[name] != wanted
            if wrong.any():
                raise ConfigError(
                    f"tokens: {self.folder}: step {step} was recorded with another {name} of sample "
                    f"{samples[wrong][0]}; train on the same data with the same batch size, crops and decoder, or "
                    f"record anew"
                )
        tokens = torch.from_numpy(found["tokens"].astype(np.int64)).to(batch.ids.device)
        return tokens if ids is None else tokens.gather(1, ids)
