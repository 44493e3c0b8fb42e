"""Numbered blocks through Ray Data: what the loop that drives them costs the process that reads."""

import time

import pytest

from pixellm.platform.data import ray_blocks
from pixellm.platform.data.pacing import PacedLoop
from pixellm.platform.data.ray_blocks import stream_blocks


def test_the_loop_rests_while_the_reader_has_blocks_waiting(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    class CountedLoop(PacedLoop):
        def on_execution_step(self, executor: object) -> None:
            rounds.append(time.monotonic())
            super().on_execution_step(executor)

    monkeypatch.setattr(ray_blocks, "PacedLoop", CountedLoop)
    values = stream_blocks(lambda number: [number] * 2, 40, task_cpus=0.5, max_tasks=2)
    taken = [next(values) for _ in range(4)]
    time.sleep(0.5)  # some blocks are made ahead
    before = len(rounds)
    time.sleep(2.0)  # a training step

    assert len(rounds) - before <= 45  # thousands without a pause
    assert [*taken, *values] == [number for number in range(40) for _ in range(2)]
