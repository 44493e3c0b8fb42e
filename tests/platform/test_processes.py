"""A process is known by number and moment of start, and ended with all that it started, and nothing else is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from pixellm.platform.processes import MARK, ProcessId, identify, is_running, marked, stop
from tests.waiting import wait_until

# Starts a child in a session of its own and, when it runs (until then it has no environment), prints its number.
PARENT = """
import subprocess, sys, time
program = "import time; print('on', flush=True); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(300)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(300)"
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python programs with a mark; whatever is left of them at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, mark: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(
            command, env=os.environ | {MARK: mark}, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def the(pid: int) -> ProcessId:
    found = identify(pid)
    assert found is not None
    return found


def test_a_process_is_not_its_successor_under_the_same_number(start: Start) -> None:
    process = the(start("import time; time.sleep(300)", "a").pid)
    assert is_running(process)
    assert not is_running(replace(process, started=process.started + "0"))
    assert not is_running(replace(process, started="another-boot:" + process.started.split(":")[1]))


def test_a_process_that_ended_is_not_running_though_nobody_collected_it(start: Start) -> None:
    child = start("print('over')", "a")
    assert child.stdout is not None
    child.stdout.read()
    wait_until(lambda: identify(child.pid) is None)


def test_stopping_ends_descendants_in_other_sessions_too(start: Start) -> None:
    parent = start(PARENT, "family")
    assert parent.stdout is not None
    child = the(int(parent.stdout.readline()))
    leader = the(parent.pid)
    assert marked("family") == {leader, child}
    stop(leader, "family", timeout_s=5)
    assert not is_running(leader)
    assert not is_running(child)


def test_what_a_dead_leader_left_is_found_by_its_mark(start: Start) -> None:
    parent = start(PARENT, "orphans")
    assert parent.stdout is not None
    child, leader = the(int(parent.stdout.readline())), the(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert is_running(child)
    stop(leader, "orphans", timeout_s=5)
    assert not is_running(child)


def test_a_stale_number_kills_nobody(start: Start) -> None:
    """The state names a process that ended; somebody else has its number now."""
    foreign = the(start("import time; time.sleep(300)", "foreign").pid)
    stop(replace(foreign, started="this-boot:1"), "mine", timeout_s=0.2)
    assert is_running(foreign)


def test_who_does_not_listen_to_sigterm_is_killed(start: Start) -> None:
    process = start(STUBBORN, "stubborn")
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    leader = the(process.pid)
    begun = time.monotonic()
    stop(leader, "stubborn", timeout_s=0.3)
    assert not is_running(leader)
    assert time.monotonic() - begun >= 0.3
