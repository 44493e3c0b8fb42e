"""What driver and workers tell each other while training runs: finished steps one way, a wish to stop the other.

One small actor on the driver's node holds it. Worker output would reach the driver with Ray's prefix and out of order;
a file would need a shared disk. Workers never wait for the actor: they send and go on.
"""

from collections import deque
from typing import Any

from pixellm.errors import PixelLMError
from pixellm.jobs.train.events import Event

_MAX_EVENTS = 100_000


class Channel:
    """The state of the actor; plain Python, so that it is tested without Ray."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=_MAX_EVENTS)
        self._is_stop_wanted = False
        self._checkpoints_wanted = 0
        self._fatal: PixelLMError | None = None

    def push(self, event: Event) -> None:
        """Keeps an event until the driver takes it."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Hands out the events since the last call."""
        events = list(self._events)
        self._events.clear()
        return events

    def request_stop(self) -> None:
        """Asks the workers to stop after their present step."""
        self._is_stop_wanted = True

    def request_checkpoint(self) -> None:
        """Asks the workers for a checkpoint after their present step."""
        self._checkpoints_wanted += 1

    def wishes(self) -> tuple[bool, int]:
        """Whether the driver asked to stop, and how many checkpoints it has asked for."""
        return self._is_stop_wanted, self._checkpoints_wanted

    def set_fatal(self, error: PixelLMError) -> None:
        """Records an error that a restart cannot mend; the first one stays."""
        self._fatal = self._fatal or error

    def fatal(self) -> PixelLMError | None:
        """The recorded error."""
        return self._fatal


def open_channel() -> Any:
    """Starts the actor on this node, without taking a logical CPU from the workers; returns its handle."""
    import ray  # slow
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Channel).options(num_cpus=0, scheduling_strategy=here).remote()


class WorkerLine:
    """A worker's end of the channel. Only rank 0 sends and asks; others do nothing."""

    def __init__(self, handle: Any, *, is_active: bool) -> None:
        self._handle = handle if is_active else None
        self._answer: Any = None
        self._wishes: tuple[bool, int] = (False, 0)
        self._checkpoints_seen = 0

    def send(self, event: Event) -> None:
        """Sends without waiting."""
        if self._handle is not None:
            self._handle.push.remote(event)

    def is_stop_wanted(self) -> bool:
        """The latest answer that has arrived; asking never waits. A driver that is gone wants a stop."""
        self._ask()
        return self._wishes[0]

    def is_checkpoint_wanted(self) -> bool:
        """Whether the driver has asked for a checkpoint since the last call."""
        seen, self._checkpoints_seen = self._checkpoints_seen, self._wishes[1]
        return self._checkpoints_seen > seen

    def _ask(self) -> None:
        if self._handle is None:
            return
        import ray  # loaded already: this is a Ray worker

        if self._answer is None:
            self._answer = self._handle.wishes.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return
        try:
            self._wishes = ray.get(self._answer)
        except ray.exceptions.RayActorError:
            self._wishes = (True, 0)
            return
        self._answer = None
