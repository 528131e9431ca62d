"""Training batches from any list of images: `decode` gives the pixels, `sampling` decides which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .decode import CropReader
from .index import ImageIndex
from .open_files import first_without_answer
from .sampling import batch_positions, crop_box, permute, substitute
from .spec import Batch, CropSpec, DataError, check_boxes, check_crops, printable
from .workers import Answers, ThreadAnswers, answers_of, parallelism

if TYPE_CHECKING:
    from .device_decode import DeviceReader

OnBadImage = Literal["error", "skip"]
_SUBSTITUTES = 16  # tries before giving up on a place in a batch
_FREE_BAD_IMAGES = 10  # tolerated however few images were seen so far
_SECONDS_PER_IMAGE = 0.25  # one of 12 megapixels takes Pillow 0.15 s of a core


class BadImage(NamedTuple):
    sample_id: int
    path: str
    reason: str


class _Place(NamedTuple):
    """What a worker is asked for: one rank's share of one step."""

    epoch: int
    step: int

    def within(self, steps_per_epoch: int) -> _Place:
        """The same place; the end of an epoch is the start of the next."""
        return self if self.step < steps_per_epoch else _Place(self.epoch + 1, 0)


class _Answer(NamedTuple):
    """What it gives back; a batch of None means that it could not be filled."""

    batch: Batch | None
    bad: list[BadImage]


class CropLoader:
    """Batches of random crops of the images of an index, shuffled anew in each epoch.

    The sequence of batches goes on across epochs, so workers prefetch over the boundary. Asking for a place that is
    not the continuation of the last one restarts them there; nothing is replayed to reach it.

    Args:
        index: the images.
        crops: what to cut out of each image; the image is decoded once.
        batch_size: images per step over all ranks.
        rank, world: this process and the number of processes; each takes an equal, contiguous part of every batch.
        seed: of order and crops.
        in_chans: channels; 1, 3 or 4 from image files, any number from .npy files of shape (H, W, C).
        workers: decoding processes; 0 = decode in this process, None = none if the native decoder runs, whose threads
            need none, else from the cores at hand.
        threads: decode with so many threads ahead of need, in this process or in each worker; None = from the cores at
            hand if `workers` is None, too; else no thread here (images are decoded when a batch is asked for), and one
            in each worker.
        on_bad_image: "error" stops at the first unusable file; "skip" takes another image in its place.
        bad_image_budget: with "skip", the share of images that may be unusable; the first ten are free.
        pin_memory: hand out page-locked tensors, for copies to a CUDA device that do not block.
        timeout_s: give up on a worker that is silent for so long, and a little longer for each image of an answer. A file
            system that hangs is told earlier.
        reader_class: what decodes.
    Attributes:
        steps_per_epoch: full batches per epoch; the rest of an epoch's order is left out.
        bad_images: (path, reason) of each unusable file met so far by this rank, without repeats.
        workers, threads: processes in use, and threads in each of them, or in this one; 0 threads: none beside the
            caller's.
        reason: one line that says which decoder runs and why.
    Raises:
        ValueError: arguments out of range, or fewer images than one batch.
        DataError: from the iterator, an unusable image, or too many of them, or a file that does not answer.
    """

    def __init__(
        self,
        index: ImageIndex,
        crops: Sequence[CropSpec],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        in_chans: int = 3,
        workers: int | None = 0,
        threads: int | None = None,
        on_bad_image: OnBadImage = "error",
        bad_image_budget: float = 0.001,
        pin_memory: bool = False,
        timeout_s: float = 300,
        reader_class: type[CropReader] | type[DeviceReader] = CropReader,
    ):
        crops = check_crops(crops, in_chans)
        batch_positions(0, batch_size, rank, world)  # checks the three
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image: expected error or skip, got {on_bad_image!r}.")
        self.index = index
        self.steps_per_epoch = len(self.index) // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size: expected at most the {len(self.index)} images of "
                f"{printable(self.index.root)}, got {batch_size}; use a smaller batch or more images."
            )
        self._skips, self._budget = on_bad_image == "skip", bad_image_budget
        self.bad_images = check_damage(index, self._skips)
        self._bad_count = self._seen_count = 0
        reader = reader_class([(crop.size, crop.filter) for crop in crops], in_chans)
        self._source = _CropDataset(self.index, crops, reader, batch_size, rank, world, seed, self._skips)
        self._local_batch = batch_size // world
        self._answer_bytes = self._local_batch * in_chans * sum(crop.size[0] * crop.size[1] for crop in crops)
        self.reason = reader.reason
        self.workers, self.threads = parallelism(workers, threads, reader, world, pin_memory, self._answer_bytes)
        self._pin_memory, self._timeout_s = pin_memory, timeout_s + _SECONDS_PER_IMAGE * self._local_batch
        self._answers: Answers | ThreadAnswers | None = None
        self._next = _Place(0, 0)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step .. steps_per_epoch - 1 of an epoch. Only the newest of these iterators may be used."""
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch, start_step: expected at least 0 and 0..{self.steps_per_epoch}, got {epoch} and {start_step}."
            )
        place = _Place(epoch, start_step).within(self.steps_per_epoch)
        if self._answers is None or place != self._next:
            self.close()
            self._next = place
            self._answers = answers_of(
                self._source,
                _Places(place, self.steps_per_epoch),
                workers=self.workers,
                threads=self.threads,
                result_bytes=self._answer_bytes,
                pin_memory=self._pin_memory,
                timeout_s=self._timeout_s,
                on_silence=self._look_for_hangs,
            )
        return self._batches(epoch, start_step)

    def set_boxes(self, boxes: np.ndarray | None) -> None:
        """See Loader.set_boxes. Workers that ran ahead with other boxes are ended."""
        # A tensor, not an array: forked workers see this memory, and to others torch hands it over without a copy each.
        checked = None if boxes is None else torch.from_numpy(check_boxes(boxes, len(self.index)))
        self.close()
        self._source.boxes = checked

    def tally(self) -> tuple[int, int]:
        """(unusable images, images) that this rank has met: what the budget counts."""
        return self._bad_count, self._seen_count

    def restore_tally(self, bad: int, seen: int) -> None:
        """Goes on with the counts of a run that is continued."""
        self._bad_count, self._seen_count = bad, seen

    def close(self) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            answers.close()

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for step in range(start_step, self.steps_per_epoch):
            if self._answers is None or self._next != (epoch, step):
                raise RuntimeError(
                    f"epoch({epoch}): expected to give step {step} next, but the loader was closed or "
                    "asked for another place; use the newest iterator only."
                )
            try:
                answer = next(self._answers)
                self._account(answer)
            except BaseException:
                self.close()
                raise
            self._next = _Place(epoch, step + 1).within(self.steps_per_epoch)
            yield answer.batch

    def _look_for_hangs(self, silent_s: float) -> None:
        """Raise if a file of the batch that is waited for does not answer."""
        path = first_without_answer(lambda: self.index.encoded(self._source.ids_at(self._next).tolist()))
        if path is not None:
            raise DataError(
                f"{printable(path)}: expected an answer of its file system, got none, after {silent_s:.0f} s without a "
                "batch; look at the disk or the network that it is on.",
                path=path,
                reason="its file system does not answer",
            )

    def _account(self, answer: _Answer) -> None:
        """Count unusable images; raise when they are not allowed, or no longer."""
        self._seen_count += self._local_batch
        self._bad_count += len(answer.bad)
        for bad in answer.bad:
            if (bad.path, bad.reason) not in self.bad_images:
                self.bad_images.append((bad.path, bad.reason))
        if not answer.bad:
            return
        last = answer.bad[-1]
        named = f"{printable(last.path)}: {last.reason} (sample {last.sample_id})"
        if not self._skips:
            advice = "repair or remove the file, or go on without it: --on-bad-image skip."
        elif answer.batch is None:
            advice = f"{_SUBSTITUTES} images in its place were unusable, too; check the data."
        elif self._bad_count > max(_FREE_BAD_IMAGES, self._budget * self._seen_count):
            advice = (
                f"{self._bad_count} of {self._seen_count} images were unusable, more than {self._budget:.2%} and "
                f"{_FREE_BAD_IMAGES}; check the data."
            )
        else:
            return
        raise DataError(f"{named}; {advice}", path=last.path, reason=last.reason)


def check_damage(index: ImageIndex, skips: bool) -> list[tuple[str, str]]:
    """(path, reason) of each file of many images of which a part cannot be read.

    Raises:
        DataError: there is one, and bad images are not to be skipped.
    """
    damage: list[tuple[str, str]] = getattr(index, "damage", [])
    if damage and not skips:
        path, reason = damage[0]
        raise DataError(
            f"{printable(path)}: {reason}; repair the file, or go on with what can be read: --on-bad-image skip.",
            path=path,
            reason=reason,
        )
    return list(damage)


class _Places:
    """The endless sequence of places from one on: the loader's sampler."""

    def __init__(self, start: _Place, steps_per_epoch: int):
        self.start, self.steps_per_epoch = start, steps_per_epoch

    def __iter__(self) -> Iterator[_Place]:
        place = self.start
        while True:
            yield place
            place = _Place(place.epoch, place.step + 1).within(self.steps_per_epoch)


class _CropDataset(Dataset):
    """Place -> answer; runs in the workers. Bad images are returned, not raised: they must reach the consumer whole."""

    def __init__(
        self,
        index: ImageIndex,
        crops: tuple[CropSpec, ...],
        reader: CropReader | DeviceReader,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        skips: bool,
    ):
        self.index, self.crops, self.reader, self.skips = index, crops, reader, skips
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.boxes: torch.Tensor | None = None
        self.pins = False

    def ids_at(self, place: _Place) -> np.ndarray:
        positions = batch_positions(place.step, self.batch_size, self.rank, self.world)
        return permute(self.seed, place.epoch, len(self.index), positions)

    def __getitem__(self, place: _Place) -> _Answer:
        epoch, ids = place.epoch, self.ids_at(place)
        shapes = [(len(ids), self.reader.in_chans, *crop.size) for crop in self.crops]
        device = self.reader.device
        tensors = [torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=self.pins) for shape in shapes]
        bad: list[BadImage] = []
        sample_ids = ids.tolist()
        for slot, error in enumerate(self._fill(epoch, sample_ids, sample_ids, tensors)):
            if error is None:
                continue
            bad.append(BadImage(sample_ids[slot], error.path, error.reason))
            places = [tensor[slot : slot + 1] for tensor in tensors]
            if not self._substitute(epoch, sample_ids[slot], places, bad):
                return _Answer(None, bad)
        return _Answer(Batch(tuple(tensors), torch.from_numpy(ids)), bad)

    def _fill(
        self, epoch: int, sample_ids: list[int], chosen: list[int], tensors: list[torch.Tensor]
    ) -> list[DataError | None]:
        """The crops of the samples, out of the chosen images; for each image what is wrong with it."""

        def boxes_of(slot: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
            sample_id = sample_ids[slot]
            around = None if self.boxes is None else tuple(self.boxes[chosen[slot]].tolist())
            boxes: dict[int, tuple[int, int, int, int]] = {}
            for crop in self.crops:
                if crop.view not in boxes:
                    boxes[crop.view] = crop_box(
                        self.seed, epoch, sample_id, crop.view, width, height, crop.scale, crop.ratio,
                        around if crop.uses_boxes else None, crop.alpha,
                    )  # fmt: skip
            return [boxes[crop.view] for crop in self.crops]

        names = [self.index.path(image) for image in chosen]
        return self.reader.read(self.index.encoded(chosen), names, boxes_of, tensors)

    def _substitute(self, epoch: int, sample_id: int, tensors: list[torch.Tensor], bad: list[BadImage]) -> bool:
        """With `skips`, fill a sample's places from another image; False if there is none to be had."""
        if not self.skips or len(self.index) < 2:
            return False
        for attempt in range(_SUBSTITUTES):
            chosen = substitute(self.seed, epoch, sample_id, attempt, len(self.index))
            (error,) = self._fill(epoch, [sample_id], [chosen], tensors)
            if error is None:
                return True
            bad.append(BadImage(chosen, error.path, error.reason))
        return False
