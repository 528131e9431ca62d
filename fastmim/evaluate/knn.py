"""k-nearest-neighbor accuracy of frozen features: no training, no hyper-parameter to tune.

Source: Wu et al., arXiv 1805.01978 section 3.4 (weighted vote exp(cosine / 0.07)); k = 20 as in DINO's protocol.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastmim_pipelines.evaluation import EvalReader
from fastmim_pipelines.index import FolderIndex
from fastmim_pipelines.loader import OnBadImage
from fastmim_pipelines.spec import DataError
from torch import Tensor
from torch.nn import functional as F

from fastmim.config import ModelSpec
from fastmim.dist import gather_rows, rank, sum_over_ranks, world_size

NEIGHBORS, TEMPERATURE = 20, 0.07


def measure(
    features: Callable[[Tensor], Tensor],
    train: FolderIndex,
    val: FolderIndex,
    model: ModelSpec,
    device: torch.device,
    **options: Any,
) -> float:
    """Accuracy in [0, 1] of a feature function over two labeled folders; the arguments are those of `labeled_features`."""
    return top1(*labeled_features(features, train, val, model, device, **options))


def labeled_features(
    features: Callable[[Tensor], Tensor],
    train: FolderIndex,
    val: FolderIndex,
    model: ModelSpec,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    on_bad_image: OnBadImage = "error",
    say: Callable[[str], None] = print,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of both folders, on every rank: what `top1` and `linear.probe` take. Each rank computes its share.

    Args:
        features: uint8 images (B, C, H, W) -> (B, D).
        train, val: labeled by one numbering of the classes.
        model: what images to read.
        workers: decoding processes; None: from the cores at hand.
        limit: use at most so many training images, evenly spread.
        on_bad_image: "error" stops at an image that cannot be read; "skip" leaves it out.
        say: told what was left out.

    Raises:
        DataError: such an image; or all of them are.
    """
    sides: list[Tensor] = []
    for index, most in ((train, limit), (val, None)):
        reader = EvalReader(
            index, model.image_size, batch_size=batch_size, rank=rank(), world=world_size(), in_chans=model.in_chans,
            workers=workers, limit=most, on_bad_image=on_bad_image,
        )  # fmt: skip
        found, labels = extract(features, reader, device)
        if not len(labels):
            raise DataError(
                f"{index.root}: expected images that can be read, got none; `fastmim verify-data` tells why"
            )
        (left_out,) = sum_over_ranks([len(reader.bad_images)], device)
        if left_out:
            one = ": ".join(reader.bad_images[0]) if reader.bad_images else "another rank's"
            say(f"data      {left_out} unreadable images of {index.root} were left out, one of them {one}")
        sides += [found, labels]
    return tuple(sides)


def top1(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> float:
    """Accuracy in [0, 1] of a weighted vote among the nearest training features by cosine.

    Args:
        train, val: (N, D), (M, D) features.
        train_labels, val_labels: (N,), (M,) int64 class numbers of one numbering.
    """
    train, val = F.normalize(train.float(), dim=1), F.normalize(val.float(), dim=1)
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    neighbors = min(NEIGHBORS, len(train))
    correct = 0
    for features, labels in zip(val.split(1024), val_labels.split(1024)):
        similarity, nearest = (features @ train.T).topk(neighbors, dim=1)
        votes = torch.zeros(len(features), classes, device=train.device)
        votes.scatter_add_(1, train_labels[nearest], (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(val)


@torch.no_grad()
def extract(
    features: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features and labels of all ranks' batches, on every rank.

    Args:
        features: uint8 images (B, C, H, W) -> (B, D).
        batches: (images, labels, ids) of this rank's share.
    """
    rows, labels = [], []
    for images, batch_labels, _ in batches:
        rows.append(features(images.to(device, non_blocking=True)).float())
        labels.append(batch_labels.to(device))
    if not rows:  # fewer images than ranks
        rows, labels = [torch.empty(0, 0, device=device)], [torch.empty(0, dtype=torch.int64, device=device)]
    return _gather_ragged(torch.cat(rows)), _gather_ragged(torch.cat(labels))


def _gather_ragged(x: Tensor) -> Tensor:
    """Concatenates tensors of different lengths over the ranks; an empty one may have another width, too."""
    if world_size() == 1:
        return x
    shapes = gather_rows(torch.tensor([x.shape], device=x.device))
    lengths, widest = shapes[:, 0].tolist(), shapes.amax(0).tolist()
    padded = x.new_zeros(widest)
    if len(x):
        padded[: len(x)] = x
    chunks = gather_rows(padded).split(max(lengths))
    return torch.cat([chunk[:n] for chunk, n in zip(chunks, lengths)])


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline that features must beat: 24 x 24 pixels per channel, standardized per image."""
    small = F.interpolate(images.float(), size=(24, 24), mode="bilinear", antialias=True).flatten(1)
    return (small - small.mean(1, keepdim=True)) / small.std(1, keepdim=True).clamp_min(1e-6)
