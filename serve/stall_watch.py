"""When an engine that has work makes no progress: a pure judgement over snapshots."""

from typing import Any


class StallWatch:
    """Remembers when progress was last seen.

    Args:
        limit_s: busy without progress for longer than this is a stall.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._progress: Any = None
        self._since_s: float | None = None

    def observe(self, progress: Any, *, is_busy: bool, now_s: float) -> float | None:
        """Takes a snapshot in.

        Args:
            progress: anything that differs after a step (counters).
            is_busy: whether there is work to make progress on.
            now_s: monotonic clock, seconds.

        Returns:
            For how many seconds the engine has been stuck, when that is beyond the limit; else None.
        """
        if not is_busy or progress != self._progress or self._since_s is None:
            self._progress, self._since_s = progress, now_s
            return None
        stalled_s = now_s - self._since_s
        return stalled_s if stalled_s > self._limit_s else None
