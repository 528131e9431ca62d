"""`fastmim doctor DATA`: how fast each stage of a training step is here, and which one holds the others up."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastmim_pipelines import make_loader
from fastmim_pipelines.cores import available_cores
from fastmim_pipelines.decode import CropReader, read_bytes, read_picture
from fastmim_pipelines.evaluation import spread
from fastmim_pipelines.index import ImageIndex
from fastmim_pipelines.native_decode import FileSpan, load
from fastmim_pipelines.sampling import crop_box
from fastmim_pipelines.spec import Batch, DataError

from fastmim import dist
from fastmim.arguments import parse_train
from fastmim.config import ConfigError
from fastmim.engine import base as engines
from fastmim.methods import base as methods
from fastmim.session import Session
from fastmim.step import to_device

# Images that are read and decoded, at most: a few seconds on one core, and enough for a mean.
SAMPLE = 256
# A step is timed with at most so many images: what a step costs per image hardly changes beyond.
STEP_BATCH = {"cpu": 16, "cuda": 256}
# Waiting less than that is not worth a change. Source: own choice.
MOST_WAITING = 0.05


class Rates(NamedTuple):
    """Images per second of each stage, all cores together; None: there is no such stage."""

    disk: float | None
    """Read from the disk, past the cache."""
    cache: float
    """Read again, from memory."""
    decode: float
    resize: float
    loader: float
    """All of that, in batches, as training does it."""
    transfer: float | None
    step: float
    """The model alone, with images that are there."""
    together: float
    waiting: float
    """Share of the time that steps waited for the loader, both at work."""


class Facts(NamedTuple):
    """What advice depends on."""

    is_native: bool
    is_packed: bool
    fits_memory: bool
    has_gpu: bool
    mean_side_px: float
    crop_side_px: int


def doctor(argv: list[str]) -> None:
    """Measures the stages one by one and all together; prints a line for each, and a verdict."""
    parser = argparse.ArgumentParser(
        prog="fastmim doctor",
        allow_abbrev=False,
        description="Measure disk, decoding, resizing, loader, transfer and step, and name what is slow.",
        epilog="All other flags are those of `fastmim train`: give the run's, with --device, --method and --model.",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="Folder of images, tar shards or a .beton file.")
    parser.add_argument("--seconds", type=float, default=3.0, help="For each measurement. (default: 3)")
    own, rest = parser.parse_known_args(argv)
    if dist.launched_world() > 1:
        raise ConfigError(f"doctor: expected one process, got {dist.launched_world()}; start it without a launcher")
    session = Session(parse_train(["--data", str(own.data), *rest]))
    if session.config.loader == "synthetic":
        raise ConfigError("doctor: expected images, got --loader synthetic; leave it out")
    rates, facts = _Examination(session, own.seconds).run()
    bottleneck, advice = verdict(rates, facts)
    print(f"bottleneck  {bottleneck}")
    for line in advice:
        print(f"advice      {line}")


def verdict(rates: Rates, facts: Facts) -> tuple[str, list[str]]:
    """What holds training up, and what to do about it."""
    cold = rates.disk is not None and rates.disk < rates.step and rates.disk < rates.loader
    if cold and not facts.fits_memory:
        return "the disk: the images do not fit into memory, so every epoch reads them from it", _for_disk(facts)
    if rates.transfer is not None and rates.transfer < min(rates.step, rates.loader):
        return "the way to the GPU", [
            "check that the GPU has all its PCIe lanes (nvidia-smi -q, section PCI) and that no other job uses them",
        ]
    if rates.waiting <= MOST_WAITING:
        advice = [
            f"data are there {rates.loader / rates.step:.1f} times as fast as the model takes them: nothing to do"
        ]
        if cold:
            advice.append(
                "but the first epoch reads from the disk, which is slower than the model: expect waiting there"
            )
        return "the model", advice
    if rates.cache < 2 * min(rates.decode, rates.resize):
        return "reading files, though they are in memory: very many small ones, or a slow file system", _for_disk(facts)
    if rates.decode <= rates.resize:
        return "decoding", _for_decoding(facts)
    return "resizing", _for_decoding(facts)


def _for_disk(facts: Facts) -> list[str]:
    advice = [] if facts.is_packed else ["fastmim pack DIR OUT --to tar: few large files instead of many small ones"]
    return [
        *advice,
        "fastmim pack --resize max:500 makes them smaller",
        "a local SSD, or memory that holds the data set",
    ]


def _for_decoding(facts: Facts) -> list[str]:
    advice = []
    if not facts.is_native:
        advice.append(
            "Pillow decodes; the native decoder takes less than half the time: see `loader` above for why not"
        )
    if facts.mean_side_px > 2 * facts.crop_side_px:
        advice.append(
            f"the images are {facts.mean_side_px:.0f} px on average, the crops {facts.crop_side_px}: "
            f"fastmim pack --resize short:{round(1.15 * facts.crop_side_px)} (or max:500 to keep more of them)"
        )
    elif not facts.is_packed:
        advice.append("fastmim pack --resize max:500 --quality 90: fewer bytes to decode")
    if facts.has_gpu:
        advice.append("--loader dali or nvimgcodec decodes on the GPU")
    return [*advice, "more cores, or a smaller share of them for other jobs"]


class _Examination:
    def __init__(self, session: Session, seconds: float):
        self.session, self.seconds, self.config = session, seconds, session.config
        self.index: ImageIndex = session.train_index
        self.cores, self.device = available_cores(), session.device
        # A sample for each kind of reading: what was read once is in memory.
        ids = spread(len(self.index), 2 * SAMPLE).tolist()
        self.cold_ids, self.ids = ids[::2], ids[1::2] or ids

    def run(self) -> tuple[Rates, Facts]:
        disk, cache = self._reading()
        decode, resize, pixels = self._decoding()
        batch_size = self._batch_size()
        options = dict(batch_size=batch_size, seed=self.config.seed, in_chans=self.config.in_chans)
        pin = self.device.type == "cuda"
        loader, reason = make_loader(
            self.config.loader, self.session.crops, data=self.index, on_bad_image="skip", bad_image_budget=1.0,
            workers=self.config.workers, pin_memory=pin, **options,
        )  # fmt: skip
        try:
            batches = chain.from_iterable(map(loader.epoch, count()))
            fed = self._timed(lambda: next(batches)) * batch_size
            self._say("loader", fed, reason)
            transfer = self._transfer(next(batches))
            noise, _ = make_loader(
                "synthetic", self.session.crops, count=max(batch_size, 64), device=self.device, **options
            )
            take_step = self._step(batch_size)
            noises = chain.from_iterable(map(noise.epoch, count()))
            step = self._timed(lambda: take_step(next(noises))) * batch_size
            model = f"{self.config.method}, {self.config.model}, {batch_size} images on {self.device.type}"
            self._say("step", step, f"{model}, no waiting for data")
            together, waiting = self._together(batches, take_step, batch_size)
        finally:
            loader.close()
        rates = Rates(disk, cache, decode, resize, fed, transfer, step, together, waiting)
        size = float(np.mean([_size_read(source) for source in self._encoded(self.ids[:32])] or [0]))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts = Facts(
            is_native="Pillow decodes" not in reason, is_packed=self.index.kind != "folder", fits_memory=size * len(self.index) < memory / 2,
            has_gpu=self.device.type == "cuda", mean_side_px=pixels**0.5, crop_side_px=max(self.session.crops[0].size),
        )  # fmt: skip
        return rates, facts

    def _say(self, stage: str, rate: float | None, text: str) -> None:
        figure = "" if rate is None else f"{rate:.0f} images/s"
        print(f"{stage:10s}  {figure:>16s}  {text}", flush=True)

    def _timed(self, action: Callable[[], object]) -> float:
        """Calls per second; the first two do not count: they start threads and fill caches."""
        action(), action()
        began, done = time.perf_counter(), 0
        while done < 2 or time.perf_counter() - began < self.seconds:
            action()
            done += 1
        self._synchronize()
        return done / (time.perf_counter() - began)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- reading -------------------------------------------------------------------------------------------------

    def _encoded(self, ids: Sequence[int]) -> list:
        """What can be read of them; what cannot is verify-data's affair."""
        return [source for source in self.index.encoded(list(ids)) if isinstance(source, str | FileSpan) or len(source)]

    def _reading(self) -> tuple[float | None, float]:
        """Images per second from the disk (None where the system does not forget what it has read) and from memory."""
        sources = self._encoded(self.cold_ids)
        has_files = all(isinstance(source, str | FileSpan) for source in sources)
        forgot = has_files and hasattr(os, "posix_fadvise") and all([_forget(source) for source in sources])
        cold_bytes, cold = self._read_all(sources)
        # The best of several: that others had the cores for a moment says nothing about the files.
        cached_bytes, cached = self._read_all(sources)
        began = time.perf_counter()
        while time.perf_counter() - began < self.seconds:
            cached = max(cached, self._read_all(sources)[1])
        if forgot:
            self._say("disk", cold, f"{cold * cold_bytes / 1e6:.0f} MB/s, {self.cores} at a time, past the cache")
        else:
            self._say("disk", None, "not measured: the system keeps what it has read, or the bytes come from a package")
        self._say("cache", cached, f"{cached * cached_bytes / 1e6:.0f} MB/s, the same from memory")
        return (cold if forgot else None), cached

    def _read_all(self, sources: Sequence) -> tuple[float, float]:
        """Bytes per image, images per second."""
        began = time.perf_counter()
        with ThreadPoolExecutor(self.cores) as pool:
            sizes = list(pool.map(_size_read, sources))
        return sum(sizes) / max(1, len(sizes)), len(sizes) / (time.perf_counter() - began)

    # -- decoding ------------------------------------------------------------------------------------------------

    def _decoding(self) -> tuple[float, float, float]:
        """Images per second of decoding and of resizing on all cores; mean pixels of an image."""
        images, names, pixels = [], [], []
        for sample_id, source in zip(self.ids, self.index.encoded(self.ids)):
            try:
                name = self.index.path(sample_id)
                picture = read_picture(source, self.config.in_chans, name)
            except DataError:
                continue
            if not (isinstance(source, FileSpan) and source.width):
                images.append(bytes(read_bytes(source)))
                names.append(name)
            pixels.append(picture)
            if sum(len(p.planes) * p.width * p.height for p in pixels) > 1 << 28:
                break
        if not pixels:
            raise DataError(
                f"{self.index.root}: not one of {len(self.ids)} images can be read; see verify-data", exit_code=4
            )
        crops = [(crop.size, crop.filter) for crop in self.session.crops]
        reader = CropReader(crops, self.config.in_chans)
        resizing = self._resize_seconds(pixels, crops, reader.uses_native)
        resize = self.cores / max(resizing, 1e-9)
        if images:
            out = [np.empty((len(images), self.config.in_chans, *size), np.uint8) for size, _ in crops]
            began = time.process_time()
            reader.read(images, names, self._boxes_of, out)
            both = (time.process_time() - began) / len(images)
            decode = self.cores / max(both - resizing, 1e-9)
        else:
            decode = float("inf")  # raw pixels
        side = np.mean([p.width * p.height for p in pixels])
        bytes_each = np.mean([len(image) for image in images]) / 1000 if images else 0
        self._say(
            "decode",
            decode,
            f"{self.cores} cores; {side / 1e3:.0f} kpixels, {bytes_each:.0f} kB on average; {reader.reason}",
        )
        self._say("resize", resize, f"{self.cores} cores; {len(crops)} crop{'s' * (len(crops) > 1)} per image")
        return decode, resize, float(side)

    def _boxes_of(self, number: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
        return [crop_box(0, 0, number, crop.view, width, height, crop.scale, crop.ratio) for crop in self.session.crops]

    def _resize_seconds(self, pictures: list, crops: list, is_native: bool) -> float:
        """CPU seconds for the crops of one image whose pixels are there."""
        whole = [p.planes[0].convert("RGB") for p in pictures[:64]]
        decoder, _ = load()
        if is_native and decoder is not None:
            with tempfile.TemporaryFile() as file:
                spans = []
                for image in whole:
                    spans.append(FileSpan("", file.tell(), 3 * image.width * image.height, file.fileno(), *image.size))
                    file.write(image.tobytes())
                file.flush()
                out = [np.empty((len(whole), 3, *size), np.uint8) for size, _ in crops]
                boxes = np.array([self._boxes_of(i, *image.size) for i, image in enumerate(whole)], float)
                with decoder.open(spans) as batch:
                    began = time.process_time()
                    batch.crop(boxes.transpose(1, 0, 2), [filter for _, filter in crops], out)
                    return (time.process_time() - began) / len(whole)
        began = time.process_time()
        for i, picture in enumerate(pictures[:64]):
            for box, (size, filter) in zip(self._boxes_of(i, picture.width, picture.height), crops):
                picture.crop(box, size, filter)
        return (time.process_time() - began) / len(whole)

    # -- the step ------------------------------------------------------------------------------------------------

    def _batch_size(self) -> int:
        config = self.config
        with torch.device("meta"):
            multiple = methods.build(config.method, self.session.model, config.options, config.seed).batch_multiple
        most = min(config.batch_size // config.accumulate, STEP_BATCH[self.device.type], len(self.index))
        if most < multiple:
            raise ConfigError(
                f"doctor: expected at least {multiple} images, a group of {config.method}, got {len(self.index)}"
            )
        return most // multiple * multiple

    def _step(self, batch_size: int) -> Callable[[Batch], None]:
        """A training step of the run's method and precision, in this process."""
        c = self.config
        method = methods.build(c.method, self.session.model, c.options, c.seed)
        engine = engines.build("single", method, engines.EngineSpec(
            device=self.device, precision=c.precision, accumulate=1, micro_batch=batch_size, lr=c.peak_lr,
            weight_decay=c.weight_decay, betas=c.betas, clip=c.clip, zero_stage=0,
        ))  # fmt: skip
        pairs, rng = method.ema_pairs(), torch.zeros(2, dtype=torch.int64, device=self.device)

        def take(batch: Batch) -> None:
            out = engine.forward(to_device(batch, self.device), rng)
            engine.backward(out.loss)
            engine.step(pairs, method.momentum(0.0))
            rng[1] += 1

        return take

    def _transfer(self, batch: Batch) -> float | None:
        if self.device.type != "cuda":
            self._say("transfer", None, "none: the step runs where the images are")
            return None
        crops = [crop.cpu().pin_memory() for crop in batch.crops]

        def copy() -> None:
            for crop in crops:
                crop.to(self.device, non_blocking=True)

        rate = self._timed(copy) * len(batch.ids)
        size = sum(crop[0].nbytes for crop in crops)
        self._say("transfer", rate, f"{rate * size / 1e9:.1f} GB/s to the GPU")
        return rate

    def _together(
        self, batches: Iterator[Batch], take_step: Callable[[Batch], None], batch_size: int
    ) -> tuple[float, float]:
        take_step(next(batches))
        self._synchronize()
        began, done, waited = time.perf_counter(), 0, 0.0
        while done < 2 or time.perf_counter() - began < self.seconds:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            take_step(batch)
            self._synchronize()  # else the wait for the device would look like a wait for data
            done += 1
        elapsed = time.perf_counter() - began
        self._say(
            "together", done * batch_size / elapsed, f"steps waited for data for {waited / elapsed:.0%} of the time"
        )
        return done * batch_size / elapsed, waited / elapsed


def _forget(source: str | FileSpan) -> bool:
    """Asks the system to drop what it keeps of a file. False if it cannot be asked."""
    try:
        path, offset, size = (source, 0, 0) if isinstance(source, str) else (source.path, source.offset, source.size)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _size_read(source) -> int:
    try:
        return len(read_bytes(source))
    except Exception:  # verify-data tells what is wrong with it
        return 0
