"""Processes that outlive the command that started them, and are ended by another: who they are, and nobody else.

A process id alone names whoever got the number last. With the moment of its start and the machine's boot it names one
process for ever. What such a process starts itself is found by a variable in the environment, which every descendant
inherits, and by its session. Linux only (`/proc`).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "PIXELLM_UP_ID"

_PROC = Path("/proc")
_POLL_S = 0.05
_KILL_WAIT_S = 10.0


@dataclass(frozen=True)
class ProcessId:
    """One process, never its successor under the same number.

    Attributes:
        pid: its number.
        started: the boot of the machine and the clock ticks since it, `BOOT:TICKS`.
    """

    pid: int
    started: str


def identify(pid: int) -> ProcessId | None:
    """Who has this number now; None where nobody does, or a process that ended and waits to be collected."""
    fields = _stat(pid)
    if fields is None or fields[0] == "Z":
        return None
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ProcessId(pid, f"{boot}:{fields[19]}")


def is_running(process: ProcessId) -> bool:
    """Whether exactly this process still runs."""
    return identify(process.pid) == process


def marked(mark: str) -> set[ProcessId]:
    """Every process in whose environment `PIXELLM_UP_ID` is `mark`: what was started with it, and what that started."""
    wanted = f"{MARK}={mark}".encode()

    def has_mark(pid: int) -> bool:
        try:
            return wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            return False

    return _found(has_mark)


def stop(leader: ProcessId, mark: str, timeout_s: float) -> None:
    """Ends a process and all that it started: SIGTERM to it, time to end in order, SIGKILL to what is left.

    Args:
        leader: the process, leader of its session; one that has ended is no error.
        mark: what its descendants carry in their environment, see `marked`.
        timeout_s: how long it may take to end in order.
    """
    family = marked(mark)
    if is_running(leader):
        family |= _found(lambda pid: (_stat(pid) or ["", "", "", "-1"])[3] == str(leader.pid))
        _signal(leader, signal.SIGTERM)
        _wait(lambda: not is_running(leader), timeout_s)
    left = {process for process in family | marked(mark) if is_running(process)}
    for process in left:
        _signal(process, signal.SIGKILL)
    _wait(lambda: not any(is_running(process) for process in left), _KILL_WAIT_S)


def _signal(process: ProcessId, number: signal.Signals) -> None:
    if is_running(process):
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _wait(is_over: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_over() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _found(is_wanted: Callable[[int], bool]) -> set[ProcessId]:
    found = {identify(pid) for pid in _pids() if pid != os.getpid() and is_wanted(pid)}
    return {process for process in found if process is not None}


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _stat(pid: int) -> list[str] | None:
    """The fields of `/proc/PID/stat` from the state on; the name before it may hold anything."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
