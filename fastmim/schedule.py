"""Learning rate as a function of the step."""

import math

# The "step" schedule: where the rate falls, as a share of the run, and to what.
# Source: microsoft/SimMIM configs/vit_base__800ep (multi-step at epoch 700 of 800, gamma 0.1).
STEP_AT, STEP_FACTOR = 7 / 8, 0.1


def learning_rate(
    step: int,
    *,
    total: int,
    warmup: int,
    peak: float,
    warmup_start: float = 0.0,
    end: float = 0.0,
    schedule: str = "cosine",
) -> float:
    """Linear warm-up from `warmup_start * peak`, then half a cosine to `end * peak`, or one step down.

    Step 0 trains at the start of the ramp (0 for MAE), step `warmup` at the peak.

    Source: facebookresearch/mae util/lr_sched.py (per step, fractional epochs); CMAE's configs start at 1e-4.
    """
    if step < warmup:
        return peak * (warmup_start + (1 - warmup_start) * step / warmup)
    if schedule == "step":
        return peak * (STEP_FACTOR if step >= round(STEP_AT * total) else 1.0)
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (end + (1 - end) * cosine)
