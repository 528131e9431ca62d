"""Linear probe: logistic regression on frozen, standardized features.

The published probes train a linear layer behind a batch norm without affine map, with LARS and for 90 epochs (MAE,
arXiv 2111.06377 section A.1; CAE). This one solves the same convex problem to its end, with L-BFGS on all features at
once, so there is no learning rate to tune; the one free number, the weight decay, is chosen on a tenth of the training
set. It sees each image once, at its center crop, and the mean over the patch tokens: compare its figures with each other,
not with those of papers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastmim_pipelines.index import FolderIndex
from torch import Tensor
from torch.nn import functional as F

from fastmim.config import ConfigError, ModelSpec
from fastmim.evaluate.knn import labeled_features

# Of the squared weights against the mean cross entropy. Own choice: features have deviation 1, and between these two
# ends the probe goes from hardly moving to interpolating its training set. From strong to weak, so that each solution
# starts the next.
WEIGHT_DECAYS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# One image in so many is held out to choose the weight decay.
HELD_OUT = 10
MOST_STEPS = 200
# Images per product: bounds the memory for logits.
CHUNK = 65536
# Source: MAE main_linprobe.py, BatchNorm1d(affine=False, eps=1e-6).
NORM_EPS = 1e-6


class Probe(NamedTuple):
    """What a linear probe found."""

    top1: float
    """Accuracy in [0, 1] on the validation images."""
    held_out: float
    """Accuracy in [0, 1] on the held-out training images, at the chosen weight decay."""
    weight_decay: float
    """The chosen one of WEIGHT_DECAYS."""


def measure(
    features: Callable[[Tensor], Tensor],
    train: FolderIndex,
    val: FolderIndex,
    model: ModelSpec,
    device: torch.device,
    **options: Any,
) -> Probe:
    """Probes a feature function over two labeled folders; the arguments are those of `knn.labeled_features`.

    Every rank computes its share of the features, and then the whole probe.
    """
    return probe(*labeled_features(features, train, val, model, device, **options))


def probe(train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor) -> Probe:
    """Fits on the training features, scores the validation features. Deterministic: nothing is drawn.

    Args:
        train, val: (N, D), (M, D) features.
        train_labels, val_labels: (N,), (M,) int64 class numbers of one numbering.

    Raises:
        ConfigError: fewer than HELD_OUT training images.
    """
    if len(train) < HELD_OUT:
        raise ConfigError(
            f"linear probe: expected at least {HELD_OUT} training images, got {len(train)}; give it more --data"
        )
    train, val = train.float(), val.float()
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    # Sorted by class first, so that every class gives its share.
    by_class = train_labels.argsort(stable=True)
    is_held = torch.arange(len(train), device=train.device) % HELD_OUT == HELD_OUT - 1
    fitted, held = by_class[~is_held], by_class[is_held]

    norm = Standardize(train[fitted])
    rows, labels, held_rows = norm(train[fitted]), train_labels[fitted], norm(train[held])
    best, best_accuracy, weight = WEIGHT_DECAYS[0], -1.0, None
    for decay in WEIGHT_DECAYS:
        weight = fit(rows, labels, classes, decay, start=weight)
        reached = accuracy(weight, held_rows, train_labels[held])
        if reached > best_accuracy:
            best, best_accuracy = decay, reached

    norm = Standardize(train)
    weight = fit(norm(train), train_labels, classes, best)
    return Probe(accuracy(weight, norm(val), val_labels), best_accuracy, best)


class Standardize:
    """Subtracts the mean of some features and divides by their deviation: batch norm without an affine map."""

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        self.scale = (features.var(0, correction=0) + NORM_EPS).rsqrt()

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


def fit(rows: Tensor, labels: Tensor, classes: int, weight_decay: float, start: Tensor | None = None) -> Tensor:
    """Weights (1 + D, classes), biases first, that minimize mean cross entropy + weight_decay / 2 x squared weights.

    Args:
        rows: (N, D) standardized features. labels: (N,) int64.
        start: weights to begin with; none: 0.
    """
    weight = torch.zeros(1 + rows.shape[1], classes, device=rows.device) if start is None else start.clone()
    weight.requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=MOST_STEPS, tolerance_grad=1e-6, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = 0.5 * weight_decay * weight[1:].square().sum()
        total.backward()
        for some, of_them in zip(rows.split(CHUNK), labels.split(CHUNK)):
            part = F.cross_entropy(logits(weight, some), of_them, reduction="sum") / len(rows)
            part.backward()
            total = total.detach() + part.detach()
        return total

    # Gradients are wanted even where the caller extracts features without them.
    with torch.enable_grad():
        solver.step(loss)
    return weight.detach()


def logits(weight: Tensor, rows: Tensor) -> Tensor:
    return torch.addmm(weight[0], rows, weight[1:])


def accuracy(weight: Tensor, rows: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of the rows whose largest logit is that of their label."""
    right = sum(int((logits(weight, x).argmax(1) == y).sum()) for x, y in zip(rows.split(CHUNK), labels.split(CHUNK)))
    return right / len(rows)
