"""The inner loop: batches in, optimiser steps out, and the decisions that all ranks take together after each step.

Nothing here knows of Ray: what happens with a finished step, who may ask to stop and how a checkpoint is written are
functions that the caller passes in.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pixellm.errors import PixelLMError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.deepspeed_engine import Batch, TrainEngine
from pixellm.jobs.train.events import LOSS_PARTS, StepRecord
from pixellm.jobs.train.schedule import learning_rate
from pixellm.model.processing import TrainingExample
from pixellm.platform.settings import TrainSettings

Item = TypeVar("Item")


@dataclass(frozen=True)
class LoopResult:
    """How the loop ended.

    Attributes:
        step: steps done in all.
        interrupted: whether somebody asked to stop before the last step.
        ended_early: whether validation found that nothing more is gained.
        samples_per_s: over all ranks and the steps of this loop, its first two left out; NaN where it had no more.
    """

    step: int
    interrupted: bool
    samples_per_s: float
    ended_early: bool = False


@dataclass(frozen=True)
class Wishes:
    """What a rank wants after a step: to stop, or a checkpoint; one rank's wish is every rank's."""

    stop: bool
    checkpoint: bool


@dataclass(frozen=True)
class PreparedBatch:
    """A rank's part of one global batch, collated: one forward's arguments per micro-batch."""

    micro_batches: list[Batch]
    sample_ids: tuple[str, ...]
    num_tokens: int


def prepare_batch(
    examples: Sequence[TrainingExample], micro_batch_size: int, collate: Callable[[Sequence[TrainingExample]], Batch]
) -> PreparedBatch:
    """Collates a rank's part of a global batch, micro-batch by micro-batch."""
    parts = [examples[first : first + micro_batch_size] for first in range(0, len(examples), micro_batch_size)]
    return PreparedBatch(
        [collate(part) for part in parts],
        tuple(example.sample_id for example in examples),
        sum(len(example.input_ids) for example in examples),
    )


def run_steps(
    engine: TrainEngine,
    batches: Iterator[PreparedBatch],
    train: TrainSettings,
    *,
    start_step: int,
    on_step: Callable[[StepRecord], None],
    wishes: Callable[[], Wishes],
    save: Callable[[int], None],
    validate: Callable[[int], bool] | None = None,
) -> LoopResult:
    """Trains from `start_step` to `train.steps`, or to the step after which any rank wants to stop.

    Args:
        engine: of this rank.
        batches: one per step, in the order of the run, starting at `start_step`.
        train: steps, schedule, checkpoint and validation interval.
        start_step: steps done before.
        on_step: called on every rank after each step.
        wishes: asked on every rank after each step.
        save: writes a checkpoint of the given number of steps; called by all ranks together, also when stopping and
            after the last step.
        validate: asks held-out questions after the given number of steps; called by all ranks together, before the
            checkpoint of that step. Says whether training ends here.

    Raises:
        PixelLMError: `train.max_skipped_steps` in a row had gradients that are not finite; the samples are named.
    """
    step, num_skipped, is_stopping, is_over = start_step, 0, False, False
    last = started = time.perf_counter()
    num_samples = 0
    while step < train.steps and not is_stopping and not is_over:
        waited = time.perf_counter()
        batch = next(batches)
        data_wait_s = time.perf_counter() - waited
        record, wanted = _one_step(engine, batch, train, step, data_wait_s, last, wishes)
        step, last, is_stopping = record.step, time.perf_counter(), wanted.stop
        num_skipped = 0 if record.is_applied else num_skipped + 1
        if num_skipped >= train.max_skipped_steps:
            _raise_not_finite(step, batch, num_skipped)
        on_step(record)
        if step - start_step == 2:
            started, num_samples = last, 0
        else:
            num_samples += record.num_samples
        is_validating = validate is not None and _is_due(step, train.validation.every, train.steps)
        is_saving = is_stopping or wanted.checkpoint or _is_due(step, train.checkpoint_every, train.steps)
        if is_validating or is_saving:
            before = time.perf_counter()
            if validate is not None and is_validating:
                is_over = validate(step)
            if is_saving or is_over or train.validation.keep_best:
                save(step)
            started += time.perf_counter() - before
            last = time.perf_counter()
    is_measured = step - start_step > 2
    rate = num_samples / (last - started) if is_measured and last > started else math.nan
    is_cut = step < train.steps
    return LoopResult(step, is_stopping and is_cut and not is_over, rate, ended_early=is_over and is_cut)


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _one_step(
    engine: TrainEngine,
    batch: PreparedBatch,
    train: TrainSettings,
    step: int,
    data_wait_s: float,
    last: float,
    wishes: Callable[[], Wishes],
) -> tuple[StepRecord, Wishes]:
    lr = learning_rate(step, peak=train.lr, warmup_steps=train.warmup_steps, total_steps=train.steps)
    result = engine.train_step(batch.micro_batches, step=step, lr=lr)
    wanted = wishes()
    mine = [
        float(wanted.stop),
        float(wanted.checkpoint),
        float(not result.is_applied),
        result.loss,
        *(result.losses.get(part, 0.0) for part in LOSS_PARTS),
        float(len(batch.sample_ids)),
        float(batch.num_tokens),
        data_wait_s,
    ]
    totals = ranks.sum_over_ranks(mine, engine.device)
    stop, checkpoint, skipped, loss, text, ref, dice, num_samples, num_tokens, waits = totals
    count = ranks.world_size()
    record = StepRecord(
        step=step + 1,
        loss=loss / count,
        losses=dict(zip(LOSS_PARTS, (text / count, ref / count, dice / count), strict=True)),
        lr=lr,
        grad_norm=result.grad_norm,
        is_applied=skipped == 0,
        num_samples=int(num_samples),
        num_tokens=int(num_tokens),
        step_s=time.perf_counter() - last,
        data_wait_s=waits / count,
    )
    return record, Wishes(stop > 0, checkpoint > 0)


def _raise_not_finite(step: int, batch: PreparedBatch, num_skipped: int) -> None:
    names = sorted({name for part in ranks.gather_objects(batch.sample_ids) for name in part})
    raise PixelLMError(
        f"loss or gradients were not finite for {num_skipped} steps in a row, the last of them step {step} with the "
        f"samples {', '.join(names[:20])}; lower train.lr, or look at these samples (train.max_skipped_steps says how "
        "many are borne)"
    )


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread of its own, a few items ahead, so that reading and collating hide behind compute.

    Args:
        make_items: makes the iterator, in the thread.
        depth: items kept ready.
    """

    def __init__(self, make_items: Callable[[], Iterator[Item]], depth: int = 2) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make_items,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        kind, value = self._queue.get()
        if kind == "item":
            return value  # type: ignore[no-any-return]
        self._queue.put((kind, value))  # every later call ends the same way
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Lets the thread end after the item it is making."""
        self._is_closed.set()

    def _work(self, make_items: Callable[[], Iterator[Item]]) -> None:
        try:
            for item in make_items():
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # thread boundary: raised again where the items are consumed
            self._put(("error", error))

    def _put(self, entry: tuple[str, Any]) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
