"""Cases of the random numbers."""

import torch

from ..cases import Case, Inputs
from . import Stream


def inputs(batch: int, count: int):
    def make(device: torch.device) -> Inputs:
        rng = torch.tensor([(123 << 32) + 456, 789], device=device)
        return {
            "rng": rng,
            "ids": torch.arange(batch, device=device) * 1_000_003,
            "stream": Stream.MASK,
            "count": count,
        }

    return make


def case(function: str, batch: int, count: int, width: int) -> Case:
    # 10 rounds of 2 multiplications and 6 xors and additions per 4 words.
    work = {"bytes_moved": batch * (8 + count * width), "flops": batch * count * 20}
    return Case(f"B{batch}_n{count}", function, inputs(batch, count), **work)


CASES = tuple(
    case(f, b, n, 8) for f in ("uniform", "random_words") for b, n in ((3, 196), (1, 1), (2, 49), (0, 5), (2, 0))
)
BENCH = (case("uniform", 1024, 196, 4), case("random_words", 1024, 196, 8))
