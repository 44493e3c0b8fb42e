"""Ray Data's scheduling loop without its busy waiting.

The loop runs in a thread of the process that reads the dataset, which here is the one that trains. While blocks wait to
be read it has nothing to do, and goes round as fast as it can: a core is lost, and the trainer waits for the
interpreter's lock after each of its operators.
"""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

_PAUSE_S = 0.05


class PacedLoop(ExecutionCallback):
    """Pauses the loop after a round in which the reader has blocks waiting.

    For `DataContext.custom_execution_callback_classes`. A reader that waits is served as fast as before.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each round, in the loop's thread."""
        if not executor._consumer_idling():
            time.sleep(_PAUSE_S)
