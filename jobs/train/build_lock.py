"""Where torch keeps DeepSpeed's compiled operator, and the lock that a killed process leaves there.

torch guards its build folder with a lock file and waits for it without end. A process killed while it loads
the operator (a worker lost to `kill -9`, an out-of-memory kill) leaves the file behind, and every later start there
hangs. The file does not say who holds it, so its age has to tell.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixellm.platform.settings import from_environment

OP_NAME = "deepspeed_shm_comm"

_log = logging.getLogger(__name__)
_CHECK_S = 2.0
#: Loading takes seconds, compiling one to two minutes; a busy machine gets several times that.
_STALE_AFTER_LOADING_S, _STALE_AFTER_COMPILING_S = 45.0, 600.0


def build_root() -> Path:
    """The folder of torch's compiled extensions: `TORCH_EXTENSIONS_DIR`, else one inside this virtual environment.

    torch's own default is one folder per user. Two environments would compile over each other there, again at each
    switch, because the compiler's command line names the environment.
    """
    chosen = from_environment().get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "torch_extensions"
    from torch.utils import cpp_extension  # imports setuptools

    return Path(cpp_extension.get_default_build_root())


def needs_compilation(root: Path | None = None) -> bool:
    """Whether the first DeepSpeed start here has to compile its CPU communication op (1 minute)."""
    return not any((root or build_root()).glob(f"**/{OP_NAME}/{OP_NAME}.so"))


def remove_stale_locks(root: Path, *, now_s: float) -> list[Path]:
    """Removes locks that are older than any living process would hold them.

    Args:
        root: torch's build folder.
        now_s: Unix time.

    Returns:
        The removed files.
    """
    removed = []
    for lock in root.glob(f"**/{OP_NAME}/lock"):
        is_built = (lock.parent / f"{OP_NAME}.so").exists()
        limit_s = _STALE_AFTER_LOADING_S if is_built else _STALE_AFTER_COMPILING_S
        try:
            if now_s - lock.stat().st_mtime > limit_s:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # released meanwhile
            continue
    return removed


@contextmanager
def stale_locks_removed() -> Iterator[None]:
    """Keeps removing stale locks for as long as the block runs, so that waiting for one ends."""
    root, done = build_root(), threading.Event()

    def watch() -> None:
        while True:
            for lock in remove_stale_locks(root, now_s=time.time()):
                _log.warning("removed %s, left behind by a process that was killed", lock)
            if done.wait(_CHECK_S):
                return

    thread = threading.Thread(target=watch, name="build-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
