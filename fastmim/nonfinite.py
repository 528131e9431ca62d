"""Steps whose gradient was not finite: the engine skips them on the device, here they are counted.

No step waits for the device: the flag of a step is read just before the update of the next one. The weights are then
still those of the skipped step, which is what a capture needs.
"""

from collections import deque

import torch
from torch import Tensor

# The budget holds for so many steps. Source: own choice, as is the budget's default; published codes stop at the first
# (MAE), go on for ever (mmpretrain) or stop at the third in a row (DINOv3).
WINDOW_STEPS = 1000


class NonFiniteError(Exception):
    """The loss or the gradient stopped being finite."""

    exit_code = 5


class Skips:
    """The skipped steps among the last `WINDOW_STEPS`.

    Args:
        budget: how many there may be.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.steps: deque[int] = deque()
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def note(self, step: int, applied: Tensor) -> None:
        """Takes the flag of a step, without waiting for it."""
        event = None
        if applied.is_cuda:
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            applied = flag.copy_(applied, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = step, applied, event

    def settle(self) -> int | None:
        """The step noted last if it was skipped."""
        if self._pending is None:
            return None
        (step, applied, event), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        while self.steps and self.steps[0] <= step - WINDOW_STEPS:
            self.steps.popleft()
        if applied:
            return None
        self.steps.append(step)
        return step

    @property
    def is_last_chance(self) -> bool:
        """Whether one more ends the run."""
        return len(self.steps) >= self.budget

    @property
    def is_spent(self) -> bool:
        return len(self.steps) > self.budget

    def state(self) -> list[int]:
        return list(self.steps)

    def restore(self, steps: list[int]) -> None:
        self.steps = deque(steps)
