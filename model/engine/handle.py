"""What a caller holds of a request: events in order, the result, and a way to give up. Safe to use from any thread.

Tokens and masks are made by different threads. A target keeps its place among the words: what follows its marker is
held until its mask is ready, so that every caller sees the same order, whichever thread was faster.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pixellm.errors import PixelLMError, RequestTimeoutError
from pixellm.model.engine.types import Done, SegmentationResult, StreamEvent, TargetDone, TargetMask, TextDelta

Listener = Callable[[StreamEvent | PixelLMError], None]
"""Called with each event, or the error that ends the request, from the engine's threads: must return at once."""


@dataclass
class _Place:
    """Where a target's event belongs; what stands behind it waits."""

    target: TargetMask | None = None


class RequestHandle:
    """One submitted request.

    Attributes:
        request_id: unique within the engine.
    """

    def __init__(self, request_id: int, cancel: Callable[[int], None], listener: Listener | None = None) -> None:
        """Used by the engine; callers get handles from `PixelLMEngine.submit`."""
        self.request_id = request_id
        self._cancel = cancel
        self._listener = listener
        self._lock = threading.Lock()
        self._line: deque[TextDelta | _Place] = deque()
        self._places: dict[int, _Place] = {}
        self._targets: list[TargetMask] = []
        self._finish: Callable[[tuple[TargetMask, ...]], SegmentationResult] | None = None
        self._events: queue.SimpleQueue[StreamEvent | PixelLMError] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._outcome: SegmentationResult | PixelLMError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the result, or the error, is there."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Gives the request up: its slot is free at the engine's next step. Harmless once it is done."""
        self._cancel(self.request_id)

    def result(self, timeout_s: float | None = None) -> SegmentationResult:
        """Waits for the answer.

        Raises:
            RequestTimeoutError: not ready after `timeout_s`; the request goes on.
            PixelLMError: whatever ended the request (cancelled, deadline, failure).
        """
        if not self._ended.wait(timeout_s):
            raise RequestTimeoutError(f"request {self.request_id} has no answer after {timeout_s} s; it goes on")
        if isinstance(self._outcome, SegmentationResult):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def events(self) -> Iterator[StreamEvent]:
        """Yields events as they come: words and targets in order, then `Done`. Events are consumed.

        Raises:
            PixelLMError: what ended the request before `Done`.
        """
        while True:
            event = self._events.get()
            if isinstance(event, PixelLMError):
                raise event
            yield event
            if isinstance(event, Done):
                return

    def add_text(self, delta: str) -> None:
        """Engine: words that follow."""
        if delta:
            with self._lock:
                self._line.append(TextDelta(delta))
                self._advance()

    def reserve_target(self, index: int) -> None:
        """Engine: target `index` belongs here; its mask will follow."""
        with self._lock:
            self._places[index] = _Place()
            self._line.append(self._places[index])

    def resolve_target(self, target: TargetMask) -> None:
        """Engine: a mask is ready."""
        with self._lock:
            self._places[target.index].target = target
            self._advance()

    def finish(self, build: Callable[[tuple[TargetMask, ...]], SegmentationResult]) -> None:
        """Engine: the last token is out; `build` makes the result once every mask is ready."""
        with self._lock:
            self._finish = build
            self._advance()

    def fail(self, error: PixelLMError) -> None:
        """Engine: the request ends without an answer. The first outcome counts."""
        with self._lock:
            self._end(error, error)

    def _advance(self) -> None:
        while self._line and not self.is_done:
            head = self._line[0]
            if isinstance(head, _Place):
                if head.target is None:
                    return
                self._targets.append(head.target)
                self._send(TargetDone(head.target))
            else:
                self._send(head)
            self._line.popleft()
        if self._finish is not None and not self.is_done:
            result = self._finish(tuple(self._targets))
            self._end(result, Done(result))

    def _end(self, outcome: SegmentationResult | PixelLMError, event: Done | PixelLMError) -> None:
        if not self.is_done:
            self._outcome = outcome
            self._send(event)
            self._ended.set()

    def _send(self, event: StreamEvent | PixelLMError) -> None:
        self._events.put(event)
        if self._listener is not None:
            self._listener(event)


class Stopwatch:
    """Adds up seconds by phase for one request."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._lap_at = self.started_at

    def lap(self, phase: str) -> None:
        """Books the time since the last lap on a phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._lap_at
        self._lap_at = now

    def mark(self, moment: str) -> None:
        """Notes the first time that a moment is reached, counted from the start."""
        self.seconds.setdefault(moment, time.monotonic() - self.started_at)
