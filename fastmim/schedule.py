"""Learning rate as a function of the step."""

import math


def learning_rate(step: int, *, total: int, warmup: int, peak: float, warmup_start: float = 0.0) -> float:
    """Linear warm-up from `warmup_start * peak`, then half a cosine to 0.

    Step 0 trains at the start of the ramp (0 for MAE), step `warmup` at the peak.

    Source: facebookresearch/mae util/lr_sched.py (per step, fractional epochs); CMAE's configs start at 1e-4.
    """
    if step < warmup:
        return peak * (warmup_start + (1 - warmup_start) * step / warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
