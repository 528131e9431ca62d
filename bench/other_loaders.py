"""The loaders that bench_loader.py measures ours against, as their users write them.

Each is a context manager around an endless iterator over batch sizes. All give random resized crops of SIZE px and SCALE
of the area as uint8 batches of BATCH images, with as many workers or threads as there are cores. What is not installed
raises ImportError.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.sampling import crop_box
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

SIZE, SCALE, RATIO, BATCH = 224, (0.08, 1.0), (3 / 4, 4 / 3), 64
_ENDLESS = 1 << 30


def pillow_crop(image: Image.Image) -> torch.Tensor:
    """Convert, crop and resize in one call of Pillow, to a tensor."""
    image = image.convert("RGB")
    draw = int(torch.randint(1 << 30, ()))
    left, top, width, height = crop_box(0, draw, 0, 0, *image.size, SCALE, RATIO)
    box = (left, top, left + width, top + height)
    pixels = np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _Files(Dataset):
    def __init__(self, folder: Path, read):
        self.index, self.read = FolderIndex(folder), read

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.read(self.index.path(i))


@contextmanager
def _data_loader(data: Dataset) -> Iterator[Iterator[int]]:
    sampler = RandomSampler(data, replacement=True, num_samples=_ENDLESS)
    loader = DataLoader(data, BATCH, sampler=sampler, num_workers=available_cores(), drop_last=True)
    iterator = iter(loader)
    yield (len(batch) for batch in iterator)
    iterator._shutdown_workers()


def pillow(folder: Path):
    return _data_loader(_Files(folder, _opened_by_pillow))


def _opened_by_pillow(path: str) -> torch.Tensor:
    return pillow_crop(Image.open(path))


def torchvision(folder: Path):
    """Its decoder and its transforms v2, on tensors."""
    return _data_loader(_Files(folder, _TorchvisionCrop()))


class _TorchvisionCrop:
    def __init__(self) -> None:
        try:
            self._io = importlib.import_module("torchvision.io")
            v2 = importlib.import_module("torchvision.transforms.v2")
        except RuntimeError as e:  # a build for CUDA beside a torch without it
            raise ImportError(f"torchvision does not import: {e}") from e
        cubic = v2.InterpolationMode.BICUBIC
        self._crop = v2.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO, interpolation=cubic, antialias=True)

    def __call__(self, path: str) -> torch.Tensor:
        return self._crop(self._io.decode_image(self._io.read_file(path), self._io.ImageReadMode.RGB))


@contextmanager
def webdataset(shards: Path) -> Iterator[Iterator[int]]:
    """Shards read one after the other, shuffled in a buffer, decoded by Pillow."""
    package = importlib.import_module("webdataset")
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    # Every worker reads every shard: there may be fewer shards than workers.
    data = package.WebDataset(paths, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False)
    data = data.repeat().shuffle(200).decode("pil").to_tuple("jpg").map_tuple(pillow_crop).batched(BATCH)
    iterator = iter(package.WebLoader(data, batch_size=None, num_workers=available_cores()))
    yield (len(batch) for (batch,) in iterator)
    iterator._shutdown_workers()


@contextmanager
def dali(folder: Path, interpolation: str = "CUBIC") -> Iterator[Iterator[int]]:
    """A pipeline of DALI's own: reader, fused decoder and crop, resize, on the CPU."""
    pipeline_def = importlib.import_module("nvidia.dali").pipeline_def
    fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    index = FolderIndex(folder)
    paths = [index.path(i) for i in range(len(index))]

    @pipeline_def(batch_size=BATCH, num_threads=available_cores(), device_id=None, seed=0)
    def graph():
        files, _ = fn.readers.file(files=paths, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            files, device="cpu", output_type=types.RGB, random_area=list(SCALE), random_aspect_ratio=list(RATIO)
        )
        kind = getattr(types, f"INTERP_{interpolation}")
        return fn.resize(images, resize_x=SIZE, resize_y=SIZE, interp_type=kind, antialias=True)

    pipeline = graph()
    pipeline.build()
    # Into memory of ours, as the iterators for frameworks do.
    yield (len(torch.from_numpy(np.array(pipeline.run()[0].as_array()))) for _ in count())


@contextmanager
def ffcv(file: Path) -> Iterator[Iterator[int]]:
    """Its own order and boxes; INTER_AREA instead of bicubic."""
    decoders, transforms = (importlib.import_module(f"ffcv.{name}") for name in ("fields.rgb_image", "transforms"))
    module = importlib.import_module("ffcv.loader")
    image = [
        decoders.RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE, ratio=RATIO),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]
    options = {"num_workers": available_cores(), "os_cache": True, "drop_last": True}
    pipelines = {"image": image, "label": None}
    loader = module.Loader(str(file), batch_size=BATCH, order=module.OrderOption.RANDOM, pipelines=pipelines, **options)
    yield (len(batch[0]) for batch in chain.from_iterable(loader for _ in count()))
