"""What the person at the terminal sees of a training run, and what MLflow keeps of it, from the workers' events."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixellm.jobs.train.events import (
    CheckpointEvent,
    Event,
    StartEvent,
    StatusEvent,
    StepRecord,
    UploadEvent,
    ValidationEvent,
    WorkerPlace,
)
from pixellm.platform.observability import ProgressLine
from pixellm.platform.tracking import Tracker

_RATE_WINDOW = 20


@dataclass
class TrainingView:
    """Takes events in, shows them and hands the numbers to MLflow.

    Attributes:
        total_steps: of the run.
        line: where progress is drawn; None shows nothing.
        tracker: the run; None records nothing.
        step: steps done.
        has_started: whether a step has been finished by this process.
        last_checkpoint: folder of the newest checkpoint that was written.
        steps_repeated: steps done again after a fault.
        steps_skipped: steps left out because a gradient was not finite.
        recover_s: for each fault, seconds from the last step before it to the first one after it.
        flops_per_token: of training; 0 where it is not known.
        peak_flops: of one device per second; 0 where it is not known.
        num_workers: of the group that trains now.
        places: where they run, in rank order.
    """

    total_steps: int
    line: ProgressLine | None
    tracker: Tracker | None
    step: int = 0
    has_started: bool = False
    last_checkpoint: str | None = None
    steps_repeated: int = 0
    steps_skipped: int = 0
    recover_s: list[float] = field(default_factory=list)
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    num_workers: int = 0
    places: tuple[WorkerPlace, ...] = ()
    _recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW))
    _last_step_at: float | None = None
    _is_recovering: bool = False

    def take(self, events: Sequence[Event]) -> None:
        """Shows and records events in the order they happened."""
        for event in events:
            if isinstance(event, StepRecord):
                self._take_step(event)
            elif isinstance(event, CheckpointEvent):
                self._take_checkpoint(event)
            elif isinstance(event, StartEvent):
                self._take_start(event)
            elif isinstance(event, ValidationEvent):
                self._take_validation(event)
            elif isinstance(event, UploadEvent):
                self._take_upload(event)
            elif isinstance(event, StatusEvent):
                self.note(event.text + " …")
        if events and isinstance(events[-1], StepRecord):
            self._draw(events[-1])

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if self.line is not None:
            self.line.note(text)

    @property
    def samples_per_s(self) -> float:
        """Samples per second over the last steps; NaN before there are two."""
        seconds = sum(record.step_s for record in self._recent)
        return sum(record.num_samples for record in self._recent) / seconds if seconds else math.nan

    def _take_step(self, record: StepRecord) -> None:
        if record.step <= self.step:
            self.steps_repeated += 1
        now = time.monotonic()
        if self._is_recovering and self._last_step_at is not None:
            self.recover_s.append(now - self._last_step_at)
            self._is_recovering = False
            self.note(f"recovered in {self.recover_s[-1]:.1f} s")
        self.step, self.has_started, self._last_step_at = record.step, True, now
        self._recent.append(record)
        if not record.is_applied:
            self.steps_skipped += 1
            self.note(
                f"step {record.step} was left out: its loss or gradients were not finite ({self.steps_skipped} so far)"
            )
        if self.tracker is not None:
            self.tracker.log_metrics(_metrics(record) | {"steps_skipped": self.steps_skipped}, record.step)

    def _take_checkpoint(self, event: CheckpointEvent) -> None:
        if event.problem is not None:
            self.note(f"warning: {event.problem}; training goes on without it")
            return
        self.last_checkpoint = event.path
        if self.tracker is not None:
            self.tracker.log_metrics({"checkpoint_s": event.seconds}, event.step)
            self.tracker.set_tags({"pixellm.last_checkpoint": event.path})

    def _take_start(self, event: StartEvent) -> None:
        for problem in event.problems:
            self.note(f"warning: {problem}; the checkpoint before it is used")
        if self.has_started:
            self.note(self._restarted(event))
            self._is_recovering = True
        elif event.checkpoint is not None:
            self.note(f"going on from {event.checkpoint}")
        self.num_workers, self.places = len(event.workers) or self.num_workers, event.workers
        self._recent.clear()
        self.last_checkpoint = event.checkpoint or self.last_checkpoint

    def _restarted(self, event: StartEvent) -> str:
        repeated = max(0, self.step - event.step)
        then, now = self.num_workers, len(event.workers)
        if now > then > 0:
            why, size = "the group grows", f" with {now} workers instead of {then}"
        else:
            why, size = "a worker was lost", f" with {now} workers instead of {then}" if now < then else ""
        return f"{why} after step {self.step}; it goes on from step {event.step}{size}, {repeated} steps are repeated"

    def _take_validation(self, event: ValidationEvent) -> None:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items() if name != "num_questions")
        self.note(f"validation after step {event.step}: {figures}{' (best)' if event.is_best else ''}")
        if self.tracker is None:
            return
        metrics = {f"val_{name}": value for name, value in event.metrics.items() if math.isfinite(value)}
        self.tracker.log_metrics(metrics | {"val_s": event.seconds}, event.step)
        if event.folder is not None and Path(event.folder).is_dir():
            self.tracker.log_artifact(Path(event.folder), f"validation/{Path(event.folder).name}")

    def _take_upload(self, event: UploadEvent) -> None:
        if event.problem is not None:
            self.note(
                f"warning: the checkpoint of step {event.step} was not copied to {event.uri} in {event.attempts} "
                f"attempts: {event.problem}; training goes on without this copy"
            )
        elif event.attempts > 1:
            self.note(f"the checkpoint of step {event.step} was copied to {event.uri} at attempt {event.attempts}")
        if self.tracker is not None and event.problem is None:
            self.tracker.log_metrics({"upload_s": event.seconds}, event.step)

    @property
    def mfu(self) -> float:
        """Share of the devices' peak over the last steps; NaN where the peak is not known.

        Picture tokens on padding count as the plan counts them, though the language model leaves them out.
        """
        seconds, tokens = sum(r.step_s for r in self._recent), sum(r.num_tokens for r in self._recent)
        peak = self.peak_flops * self.num_workers
        return tokens / seconds * self.flops_per_token / peak if seconds and peak else math.nan

    def _draw(self, record: StepRecord) -> None:
        if self.line is None:
            return
        wait_share = record.data_wait_s / record.step_s if record.step_s else 0.0
        values = {
            "loss": record.loss,
            **record.losses,
            "lr": record.lr,
            "grad": record.grad_norm,
            "tokens/s": record.num_tokens / record.step_s if record.step_s else math.nan,
            "data wait %": 100 * wait_share,
        }
        if not math.isnan(self.mfu):
            values["MFU %"] = 100 * self.mfu
        rate = self.samples_per_s
        self.line.update(record.step, values, None if math.isnan(rate) else rate)


def _metrics(record: StepRecord) -> dict[str, float]:
    return {
        "loss": record.loss,
        **{f"loss_{name}": value for name, value in record.losses.items()},
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "samples_per_s": record.num_samples / record.step_s if record.step_s else math.nan,
        "tokens_per_s": record.num_tokens / record.step_s if record.step_s else math.nan,
        "data_wait_s": record.data_wait_s,
    }
