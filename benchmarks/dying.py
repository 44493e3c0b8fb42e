"""A process that is killed in the middle of its work, once."""

import os
import signal
from pathlib import Path


def die_once(marker: Path) -> None:
    """Kills this process (-9) if `marker` exists; of several, the one that removes it."""
    try:
        marker.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
