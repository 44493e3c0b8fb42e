"""Ray Data's scheduling loop without its busy waiting.

The loop runs in a thread of the process that reads the dataset, which here is the one that trains. While blocks wait to
be read it has nothing to do, and goes round as fast as it can: a core is lost, and the trainer waits for the
interpreter's lock after each of its operators.
"""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

_SHORTEST_S, _LONGEST_S = 0.002, 0.064


class PacedLoop(ExecutionCallback):
    """Pauses the loop after each round in which the reader has blocks waiting, longer from round to round.

    For `DataContext.custom_execution_callback_classes`. A reader that waits is served as fast as before.
    """

    def __init__(self) -> None:
        self._pause_s = _SHORTEST_S

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each round, in the loop's thread."""
        if executor._consumer_idling():
            self._pause_s = _SHORTEST_S
            return
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_S)
