"""What a submitted job runs, `python -m pixellm.job COMMAND…`: the command line, under the Python that runs Ray there.

A job's command is started by a shell, so `python3` is whatever PATH says: where Ray was started as
`/opt/venv/bin/ray start` and nobody activated that environment, it is the system's, which has none of our dependencies.
Ray's own Python has them; the raylet, an ancestor of every job, names it on its command line.
"""

import os
import sys
from pathlib import Path

_PROC = Path("/proc")
_FLAG = b"--python_worker_command="


def main() -> None:
    """Becomes `pixellm.cli` under Ray's Python; under this one where no raylet is found among the ancestors."""
    python = python_of_raylet(os.getpid()) or sys.executable
    os.execv(python, [python, "-P", "-m", "pixellm.cli", *sys.argv[1:]])


def python_of_raylet(pid: int, proc: Path = _PROC) -> str | None:
    """The interpreter with which the nearest raylet above a process starts its workers, if it can be seen.

    Args:
        pid: the process whose ancestors are looked at.
        proc: where the process table is mounted (Linux); elsewhere nothing is found.
    """
    while pid > 1:
        try:
            words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
            pid = _parent(proc / str(pid) / "stat")
        except (OSError, ValueError, IndexError):
            return None
        for word in words:
            if word.startswith(_FLAG):
                python = os.fsdecode(word.removeprefix(_FLAG).split(b" ")[0])
                return python if os.access(python, os.X_OK) else None
    return None


def _parent(stat: Path) -> int:
    """The fourth field; the second, the program's name in brackets, may hold anything."""
    return int(stat.read_text().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    main()
