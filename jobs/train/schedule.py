"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

The shape is DeepSpeed's `WarmupDecayLR` (linear warm-up from 0, then linear decay to 0), which the released recipe
uses. DeepSpeed's own first step has rate 0 and does nothing; here the first step already moves.
"""


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of one optimiser step.

    Args:
        step: 0-based index of the optimiser step.
        peak: rate at the end of the warm-up.
        warmup_steps: steps of linear growth; 0 starts at the peak.
        total_steps: after these the rate is 0.

    Returns:
        `peak · (step + 1) / warmup_steps` while warming up, else `peak · (total − step) / (total − warmup)`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
