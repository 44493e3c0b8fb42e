"""Waiting for what another thread or process does: by a condition, never by a pause that is long enough here."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(holds: Callable[[], Any], what: str = "what was waited for", seconds: float = 180.0) -> None:
    """Returns once `holds()`; fails after `seconds`, which only a failure takes: many, for a slow machine."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.01)
