"""Ctrl-C in the driver: the first one asks for a stop, the second one ends at once.

While the block runs, SIGINT and SIGTERM set a flag instead of raising; Ray Train's own handler is never installed,
because `fit` runs in another thread. Outside the main thread nothing is changed.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Whether a first signal has come."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Asks to stop, as a first signal does.

        Raises:
            KeyboardInterrupt: it was asked before.
        """
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the second raises KeyboardInterrupt in the main thread."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        request.ask()

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
