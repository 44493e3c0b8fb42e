"""What workers report while training runs, and what they return: plain numbers and words that travel between processes.

Light on purpose: the driver and the actor between them load nothing heavy for it.
"""

from dataclasses import dataclass

LOSS_PARTS = ("text", "ref", "dice")


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, averaged over the ranks. Plain numbers: it travels to the driver.

    Attributes:
        step: steps done, this one included.
        loss: weighted sum of the parts.
        losses: `text`, `ref`, `dice`, weighted.
        lr: learning rate.
        grad_norm: before clipping.
        is_applied: false if a gradient was not finite and the step was left out.
        num_samples: samples over all ranks.
        num_tokens: text and picture positions over all ranks.
        step_s: seconds since the end of the step before.
        data_wait_s: part of it spent waiting for the batch, on the slowest rank's average.
    """

    step: int
    loss: float
    losses: dict[str, float]
    lr: float
    grad_norm: float
    is_applied: bool
    num_samples: int
    num_tokens: int
    step_s: float
    data_wait_s: float


@dataclass(frozen=True)
class StatusEvent:
    """What rank 0 is doing before the first step, in words."""

    text: str


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint was written, or (with `problem`) could not be."""

    step: int
    path: str
    seconds: float
    problem: str | None = None


@dataclass(frozen=True)
class WorkerPlace:
    """Where one rank runs: Ray's id of the node (empty without Ray), host name and process."""

    node_id: str
    host: str
    pid: int


@dataclass(frozen=True)
class StartEvent:
    """The worker group is about to train; after a fault it comes again.

    Attributes:
        step: steps already done.
        checkpoint: what it goes on from, or None.
        problems: newer checkpoints that were passed over, each with its reason.
        workers: who trains, in rank order.
    """

    step: int
    checkpoint: str | None
    problems: tuple[str, ...]
    workers: tuple[WorkerPlace, ...] = ()


@dataclass(frozen=True)
class ValidationEvent:
    """Held-out questions were answered after a step.

    Attributes:
        step: steps done.
        metrics: `giou`, `ciou`, `text_loss`, counts.
        is_best: whether the chosen metric is better than ever before.
        folder: of the pictures; None where none were drawn.
        seconds: that it took.
    """

    step: int
    metrics: dict[str, float]
    is_best: bool
    folder: str | None
    seconds: float


@dataclass(frozen=True)
class UploadEvent:
    """A checkpoint was copied to `train.checkpoint_uri`, or (with `problem`) could not be."""

    step: int
    uri: str
    seconds: float
    attempts: int
    problem: str | None = None


Event = StatusEvent | CheckpointEvent | StartEvent | StepRecord | ValidationEvent | UploadEvent


@dataclass(frozen=True)
class WorkerResult:
    """What rank 0 gives back. Attributes as in `LoopResult`; `resumed_from` is a step, None for a new run."""

    step: int
    interrupted: bool
    samples_per_s: float
    resumed_from: int | None
    ended_early: bool = False
