"""Numbered blocks through Ray Data: what the loop that drives them costs the process that reads."""

import time
from typing import Any

import pytest

from pixellm.platform.data import ray_blocks
from pixellm.platform.data.pacing import PacedLoop
from pixellm.platform.data.ray_blocks import stream_blocks
from tests.waiting import wait_until


def test_the_loop_rests_while_the_reader_has_blocks_waiting(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[bool] = []  # by round: whether blocks waited for the reader

    class CountedLoop(PacedLoop):
        def on_execution_step(self, executor: Any) -> None:
            waiting.append(not executor._consumer_idling())
            super().on_execution_step(executor)

    monkeypatch.setattr(ray_blocks, "PacedLoop", CountedLoop)
    values = stream_blocks(lambda number: [number] * 2, 40, task_cpus=0.5, max_tasks=2)
    taken = [next(values) for _ in range(4)]
    wait_until(lambda: len(waiting) >= 10 and all(waiting[-10:]))  # blocks are made ahead: on a busy machine, late
    before = len(waiting)
    time.sleep(2.0)  # a training step

    assert all(waiting[before:])
    assert len(waiting) - before <= 45  # thousands without a pause
    assert [*taken, *values] == [number for number in range(40) for _ in range(2)]
