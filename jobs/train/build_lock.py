"""Where torch keeps DeepSpeed's compiled operator, and the lock under which this project's processes load it.

torch guards its build folder with a lock file and waits for it without end. A process killed while it loads
the operator (a worker lost to `kill -9`, an out-of-memory kill) leaves the file behind, and every later start there
hangs. The file does not say who holds it, and its age does not either: a slow machine compiles for minutes. So a lock
of the operating system goes around torch's. It ends with its process, and who holds it knows that nobody else loads.
"""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixellm.platform.settings import from_environment

OP_NAME = "deepspeed_shm_comm"

_log = logging.getLogger(__name__)


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

    return Path(cpp_extension.get_default_build_root()) / "pixellm"


def needs_compilation(root: Path | None = None) -> bool:
    """Whether the first DeepSpeed start here has to compile its CPU communication op (1 minute)."""
    return not any((root or build_root()).glob(f"**/{OP_NAME}/{OP_NAME}.so"))


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Waits until no other process is in such a block, and removes the lock that a killed one left to torch.

    Args:
        root: torch's build folder; made if it is not there.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "pixellm.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, also by the end of the process
        for lock in root.glob(f"**/{OP_NAME}/lock"):
            lock.unlink()
            _log.warning("removed %s, left behind by a process that was killed", lock)
        yield
