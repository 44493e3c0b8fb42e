"""What the person at the terminal sees of a training run, and what MLflow keeps of it, from the workers' events."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pixellm.jobs.train.events import CheckpointEvent, Event, StartEvent, StatusEvent, StepRecord
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
    """

    total_steps: int
    line: ProgressLine | None
    tracker: Tracker | None
    step: int = 0
    has_started: bool = False
    last_checkpoint: str | None = None
    steps_repeated: int = 0
    _recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW))

    def take(self, events: Sequence[Event]) -> None:
        """Shows and records events in the order they happened."""
        for event in events:
            if isinstance(event, StepRecord):
                self._take_step(event)
            elif isinstance(event, CheckpointEvent):
                self._take_checkpoint(event)
            elif isinstance(event, StartEvent):
                self._take_start(event)
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
        self.step, self.has_started = record.step, True
        self._recent.append(record)
        if self.tracker is not None:
            self.tracker.log_metrics(_metrics(record), record.step)
        if not record.is_applied:
            self.note(f"step {record.step} was left out: its gradients were not finite")

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
            self.note(f"a worker was lost after step {self.step}; the group goes on from step {event.step}")
        elif event.checkpoint is not None:
            self.note(f"going on from {event.checkpoint}")
        self._recent.clear()
        self.last_checkpoint = event.checkpoint or self.last_checkpoint

    def _draw(self, record: StepRecord) -> None:
        if self.line is None:
            return
        wait_share = record.data_wait_s / record.step_s if record.step_s else 0.0
        values = {
            "loss": record.loss,
            **record.losses,
            "lr": record.lr,
            "grad": record.grad_norm,
            "data wait %": 100 * wait_share,
        }
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
