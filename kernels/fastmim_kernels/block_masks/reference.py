"""Block masks of the whole batch at once: a fixed number of rounds, each of which looks at many rectangles.

A round tries TRIES rectangles on the mask as it stands and masks the first that fits, which is what trying them one
after the other does: nothing changes before one fits. Images that are done ignore the rest.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_readable
from ..masks import MaskIds
from ..masks.reference import INDEX_BITS, mask_ids
from ..philox import Stream
from ..philox.reference import random_words

# At 14x14 with 98 masked an image takes 17 tries on average and 5.5 rectangles (2,000 masks).
ROUNDS, TRIES = 20, 16
# Words per try: one for area and aspect, one for top and left, 16 bits each.
WORDS = 2


def block_masking(
    rng: Tensor,
    ids: Tensor,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_block: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> MaskIds:
    """See the public function."""
    batch, (rows, columns) = len(ids), grid
    words = random_words(rng, ids, Stream.BLOCK, ROUNDS * TRIES * WORDS).view(batch, ROUNDS, TRIES, WORDS)
    # float64: the same rectangle on every device but for areas within 1e-15 of a rounding border.
    area_draw, aspect_draw = (half.double() * 2.0**-16 for half in halves(words[..., 0]))
    low, high = (math.log(a) for a in aspect)
    ratio = torch.exp(low + (high - low) * aspect_draw)
    place = torch.stack(halves(words[..., 1]), -1)

    mask = torch.zeros((batch, rows, columns), dtype=torch.bool, device=ids.device)
    missing = torch.full((batch,), num_masked, device=ids.device)
    for i in range(ROUNDS):
        if is_readable(missing) and not missing.any():
            break
        area = min_block + (missing[:, None] - min_block) * area_draw[:, i]
        # round(), as Python's: half to even.
        h, w = (area * ratio[:, i]).sqrt().round().long(), (area / ratio[:, i]).sqrt().round().long()
        top, left = ((place[:, i] * (torch.stack([rows - h, columns - w], -1) + 1)) >> 16).unbind(-1)
        fits = (h < rows) & (w < columns)
        box = [torch.where(fits, value, 0) for value in (top, left, top + h, left + w)]
        added = h * w - count_inside(mask, *box)
        accepted = fits & (added > 0) & (added <= missing[:, None])
        first = accepted.int().argmax(1, keepdim=True)
        # Without an accepted one the box is empty.
        top, left, bottom, right = ((side * accepted).gather(1, first) for side in box)
        y, x = (torch.arange(n, device=ids.device) for n in grid)
        mask = mask | ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
        missing = num_masked - mask.sum((1, 2))
    if not is_readable(missing) or missing.any():
        mask = fill(mask, missing, words[:, 0, 0, 0])
    flat = mask.flatten(1)
    # Visible patches first, each kind in raster order.
    keys = flat.long() << INDEX_BITS | torch.arange(rows * columns, device=ids.device)
    return mask_ids(keys.sort(dim=1).values & ((1 << INDEX_BITS) - 1), rows * columns - num_masked)


def halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 16 bits of words of 32."""
    return words >> 16 & 0xFFFF, words & 0xFFFF


def count_inside(mask: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """(B, T) masked patches inside the boxes (B, T) of each image, from sums over all corners' upper left parts."""
    sums = F.pad(mask.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    width, flat = sums.shape[2], sums.flatten(1)

    def corner(y: Tensor, x: Tensor) -> Tensor:
        return flat.gather(1, y * width + x)

    return corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)


def fill(mask: Tensor, missing: Tensor, word: Tensor) -> Tensor:
    """Mask the ``missing`` (B,) patches with the most masked neighbors, ties in raster order from patch word % L on."""
    total = mask[0].numel() if len(mask) else 1
    around = F.pad(mask.long(), (1, 1, 1, 1))
    neighbors = around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]
    later = (torch.arange(total, device=mask.device) - word[:, None]) % total
    # Distinct among the visible patches, so that the order has no ties.
    score = torch.where(mask.flatten(1), -1, neighbors.flatten(1) * total + total - 1 - later)
    last = score.sort(dim=1, descending=True).values.gather(1, (missing - 1).clamp_min(0)[:, None])
    chosen = (score >= last.clamp_min(0)) & (missing > 0)[:, None]
    return mask | chosen.view_as(mask)
