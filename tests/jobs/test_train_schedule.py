"""The learning rate as a function of the step."""

import pytest
import torch

from pixellm.jobs.train.schedule import learning_rate


def test_after_the_warm_up_the_rate_is_that_of_deepspeeds_warmup_decay() -> None:
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = WarmupDecayLR(optimizer, 50, warmup_max_lr=3e-4, warmup_num_steps=10, warmup_type="linear")
    rates = []
    for step in range(50):
        theirs.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    ours = [learning_rate(step, peak=3e-4, warmup_steps=10, total_steps=50) for step in range(50)]
    assert ours[10:] == pytest.approx(rates[10:])
    assert ours[:9] == pytest.approx(rates[1:10])  # the warm-up is one step ahead: the first step moves


def test_the_rate_peaks_at_the_end_of_the_warm_up_and_is_never_zero_before_the_end() -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=5, total_steps=20) for step in range(20)]
    assert max(rates) == rates[4] == rates[5] == 1.0
    assert min(rates) > 0
    assert learning_rate(20, peak=1.0, warmup_steps=5, total_steps=20) == 0


def test_without_a_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate(0, peak=0.5, warmup_steps=0, total_steps=10) == 0.5
