"""The inner loop's decisions, with an engine that only counts."""

import math
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pixellm.errors import DataError, PixelLMError
from pixellm.jobs.train.deepspeed_engine import StepResult
from pixellm.jobs.train.events import StepRecord
from pixellm.jobs.train.loop import LoopResult, Prefetcher, PreparedBatch, Wishes, prepare_batch, run_steps
from pixellm.platform.settings import TrainSettings
from tests.waiting import wait_until


class CountingEngine:
    """Takes steps that do nothing; those in `bad_steps` are left out as not finite."""

    device = "cpu"

    def __init__(self, bad_steps: set[int] | None = None) -> None:
        self.bad_steps = bad_steps or set()
        self.seen: list[tuple[int, float]] = []

    def train_step(self, micro_batches: Any, *, step: int, lr: float) -> StepResult:
        self.seen.append((step, lr))
        is_applied = step not in self.bad_steps
        return StepResult(1.0, {"text": 0.75, "ref": 0.25}, 2.0, is_applied)


def _batches(first: int) -> Iterator[PreparedBatch]:
    step = first
    while True:
        yield PreparedBatch([{}], (f"a/{step}", f"b/{step}"), 100)
        step += 1


def _run(
    steps: int, *, start: int = 0, stop_after: int | None = None, every: int = 4, bad_steps: set[int] | None = None
) -> tuple[LoopResult, list[StepRecord], list[int], CountingEngine]:
    engine, records, saved = CountingEngine(bad_steps), [], []
    result = run_steps(
        engine,  # type: ignore[arg-type]
        _batches(start),
        TrainSettings(steps=steps, checkpoint_every=every, warmup_steps=2),
        start_step=start,
        on_step=records.append,
        wishes=lambda: Wishes(stop_after is not None and len(records) + 1 >= stop_after, False),
        save=saved.append,
    )
    return result, records, saved, engine


def test_every_step_is_taken_once_and_checkpoints_fall_on_the_interval_and_the_end() -> None:
    result, records, saved, engine = _run(10)
    assert [step for step, _ in engine.seen] == list(range(10))
    assert [record.step for record in records] == list(range(1, 11))
    assert saved == [4, 8, 10]
    assert (result.step, result.interrupted) == (10, False)
    assert records[0].losses == {"text": 0.75, "ref": 0.25, "dice": 0.0}
    assert records[0].num_samples == 2


def test_a_wish_to_stop_ends_the_loop_after_the_present_step_with_a_checkpoint() -> None:
    result, records, saved, _ = _run(10, stop_after=3)
    assert [record.step for record in records] == [1, 2, 3]
    assert saved == [3]
    assert result.interrupted


def test_a_resumed_loop_goes_on_at_its_step_with_the_rates_of_the_whole_run() -> None:
    *_, whole = _run(10)
    result, _, saved, resumed = _run(10, start=6)
    assert resumed.seen == whole.seen[6:]
    assert saved == [8, 10]
    assert result.step == 10


def test_a_wish_to_stop_at_the_last_step_does_not_make_a_finished_run_an_interrupted_one() -> None:
    result, _, saved, _ = _run(4, stop_after=4)
    assert not result.interrupted
    assert saved == [4]


def test_nothing_is_trained_when_the_last_step_is_done_already() -> None:
    result, records, saved, _ = _run(5, start=5)
    assert (result.step, result.interrupted, records, saved) == (5, False, [], [])
    assert math.isnan(result.samples_per_s)


def test_two_bad_steps_are_left_out_and_three_in_a_row_name_their_samples() -> None:
    result, records, _, _ = _run(8, bad_steps={1, 2, 4, 5})
    assert [record.step for record in records if not record.is_applied] == [2, 3, 5, 6]
    assert result.step == 8
    with pytest.raises(PixelLMError, match=r"3 steps in a row.*step 5 with the samples a/4, b/4"):
        _run(8, bad_steps={2, 3, 4})


def test_a_ranks_part_is_collated_micro_batch_by_micro_batch() -> None:
    examples = [SimpleNamespace(sample_id=f"s{k}", input_ids=[0] * (k + 1)) for k in range(5)]
    batch = prepare_batch(examples, 2, lambda part: {"ids": [example.sample_id for example in part]})  # type: ignore[arg-type]
    assert [part["ids"] for part in batch.micro_batches] == [["s0", "s1"], ["s2", "s3"], ["s4"]]
    assert batch.num_tokens == 15


def test_prefetching_keeps_the_order_and_raises_where_the_items_are_consumed() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise DataError("item 5 is damaged")

    prefetched = Prefetcher(items, depth=2)
    assert [next(prefetched) for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(DataError, match="item 5"):
            next(prefetched)


def test_a_closed_prefetcher_lets_its_thread_end() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    prefetched = Prefetcher(items, depth=1)
    next(prefetched)
    prefetched.close()
    wait_until(lambda: all(thread.name != "prefetch" for thread in threading.enumerate()))
    assert len(made) < 10
