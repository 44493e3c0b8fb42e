"""Which requests run in the next step: a pure function of what waits, what runs and the clock.

The engine executes a `StepPlan` and knows no policy of its own; the policy knows no tensors. The rules:

- a cancelled or expired request leaves before anything else happens, so its slot is free in the same step;
- free slots go to waiting requests: first those that have waited longer than `patience_s`, in order of arrival; then
  those of the client with the fewest requests running, so that one client's queue never stands in front of another's;
- every running answer advances in every step; what is left of the step's token budget goes to prompts, in order of
  admission, in chunks, and never less than `min_prefill_tokens`, so that neither can starve the other.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pixellm.errors import ConfigError


@dataclass(frozen=True)
class SchedulerLimits:
    """What bounds a step.

    Attributes:
        max_batch_size: slots: most requests that run together.
        max_waiting: most requests that wait for a slot; more are refused at submission.
        max_step_tokens: positions that one step may run through the language model.
        min_prefill_tokens: prompt positions that a step takes even where answers use up its budget.
        max_admissions: requests that may join in one step, each with a vision pass.
        patience_s: after this long, arrival counts more than fairness between clients.
    """

    max_batch_size: int = 8
    max_waiting: int = 256
    max_step_tokens: int = 1024
    min_prefill_tokens: int = 64
    max_admissions: int = 4
    patience_s: float = 10.0

    def __post_init__(self) -> None:
        """Refuses limits under which nothing could run.

        Raises:
            ConfigError: naming the limit.
        """
        for name in ("max_batch_size", "max_step_tokens", "min_prefill_tokens", "max_admissions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting is {self.max_waiting}; it must not be negative")


@dataclass(frozen=True)
class WaitingRequest:
    """A request without a slot. Times are seconds of one monotonic clock."""

    request_id: int
    arrived_at: float
    client: str = ""
    deadline: float | None = None


@dataclass(frozen=True)
class RunningRequest:
    """A request in a slot.

    Attributes:
        request_id: unique.
        prompt_left: prompt positions that are not in the cache yet; 0 once it generates.
        next_tokens: positions that its next step of generation runs: 1, or a whole group.
        client: who asked.
        deadline: when it fails, or None.
    """

    request_id: int
    prompt_left: int = 0
    next_tokens: int = 1
    client: str = ""
    deadline: float | None = None


@dataclass(frozen=True)
class SchedulerState:
    """Everything that a plan depends on.

    Attributes:
        waiting: in order of arrival.
        running: in order of admission.
        cancelled: ids whose callers gave up.
    """

    waiting: tuple[WaitingRequest, ...] = ()
    running: tuple[RunningRequest, ...] = ()
    cancelled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class StepPlan:
    """What one step does, in this order.

    Attributes:
        drop: cancelled requests, whatever they were doing.
        expire: requests past their deadline.
        admit: waiting requests that get a slot; their prompts start in the next step.
        prefill: (request, prompt positions) to run.
        decode: requests whose answers advance.
    """

    drop: tuple[int, ...] = ()
    expire: tuple[int, ...] = ()
    admit: tuple[int, ...] = ()
    prefill: tuple[tuple[int, int], ...] = ()
    decode: tuple[int, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.drop or self.expire or self.admit or self.prefill or self.decode)


@dataclass
class _Budget:
    left: int
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def take(self, request_id: int, wanted: int) -> None:
        granted = min(self.left, wanted)
        if granted > 0:
            self.left -= granted
            self.chunks.append((request_id, granted))


def plan_step(state: SchedulerState, limits: SchedulerLimits, now: float) -> StepPlan:
    """Decides the next step.

    Args:
        state: what waits and runs.
        limits: what bounds the step.
        now: the clock, in seconds.

    Returns:
        The plan; idle where nothing can advance.
    """
    known = _known(state)
    drop = tuple(r.request_id for r in known if r.request_id in state.cancelled)
    expire = tuple(
        r.request_id
        for r in known
        if r.request_id not in state.cancelled and r.deadline is not None and now >= r.deadline
    )
    gone = {*drop, *expire}
    running = [r for r in state.running if r.request_id not in gone]
    waiting = [r for r in state.waiting if r.request_id not in gone]
    decode = [r for r in running if r.prompt_left == 0]
    spent = sum(r.next_tokens for r in decode)
    budget = _Budget(max(limits.max_step_tokens - spent, limits.min_prefill_tokens))
    for request in running:
        budget.take(request.request_id, request.prompt_left)
    num_free = min(limits.max_batch_size - len(running), limits.max_admissions)
    return StepPlan(
        drop=drop,
        expire=expire,
        admit=_admissions(waiting, running, num_free, now - limits.patience_s),
        prefill=tuple(budget.chunks),
        decode=tuple(r.request_id for r in decode),
    )


def next_deadline(state: SchedulerState) -> float | None:
    """The earliest deadline of anything known, or None: how long an idle engine may sleep."""
    deadlines = [r.deadline for r in _known(state) if r.deadline is not None]
    return min(deadlines, default=None)


def _known(state: SchedulerState) -> list[WaitingRequest | RunningRequest]:
    return [*state.waiting, *state.running]


def _admissions(
    waiting: Iterable[WaitingRequest], running: Iterable[RunningRequest], num_free: int, impatient_since: float
) -> tuple[int, ...]:
    left = list(waiting)
    num_running = Counter(r.client for r in running)
    admitted: list[int] = []
    while left and len(admitted) < num_free:

        def rank(place: int) -> tuple[bool, int, int]:
            request = left[place]
            has_patience = request.arrived_at > impatient_since
            return has_patience, num_running[request.client] if has_patience else 0, place

        chosen = left.pop(min(range(len(left)), key=rank))
        num_running[chosen.client] += 1
        admitted.append(chosen.request_id)
    return tuple(admitted)
