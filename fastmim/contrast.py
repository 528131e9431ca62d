"""Contrast over accumulated micro-batches, exact: each is compared with the images of the whole step.

A first pass without gradient gives what the contrast needs of every image; then each micro-batch runs with gradient, and
its own images take their place among those of its rank's other micro-batches. Heads with batch norm and the loss see the
whole step, so that N micro-batches give the losses and gradients of one big batch.

Source: GradCache (Gao et al., arXiv 2101.06983). It keeps the gradient of the representations and runs the heads once;
here the heads run again with each micro-batch: a thousandth of the work, and engines see an ordinary forward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Representations(NamedTuple):
    """What the contrast needs of each image, before any layer that looks at other images (batch norm); a row each."""

    online: Tensor
    """(B, ...); the gradient flows through it."""
    target: Tensor
    """(B, ...), without gradient."""


class Rest(NamedTuple):
    """The images of a rank's step, in their order, for one of its micro-batches."""

    all: Representations
    start: int
    """Row of the micro-batch's first image."""


def join(own: list[Representations]) -> list[Rest]:
    """What each micro-batch has to know of all, from the representations of each."""
    everything = Representations(*(torch.cat(parts) for parts in zip(*own)))
    rests, start = [], 0
    for each in own:
        rests.append(Rest(everything, start))
        start += len(each.online)
    return rests


def among(rest: Rest, online: Tensor) -> Representations:
    """Those of all the step's images, in which the micro-batch's own rows `online` carry gradient.

    Engines divide the gradient of each of N micro-batches by N. That is right for the heads, whose whole gradient each
    micro-batch finds; the rows get theirs in one micro-batch alone, hence N times.
    """
    every, target = rest.all
    end, count = rest.start + len(online), len(every) // len(online)
    own = online.detach() + count * (online - online.detach())
    return Representations(torch.cat([every[: rest.start], own.to(every.dtype), every[end:]]), target)
