"""A cluster of our own as a team starts it: a head, further raylets, a token, temporary folders of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOKEN = "0123456789abcdef" * 4
DEADLINE_S = 240
_VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_health_check_failure_threshold": "60",  # a busy machine is no reason to declare a node dead
    "RAY_worker_niceness": "0",  # nor to starve its workers
}


@dataclass(frozen=True)
class Head:
    """A running head: the dashboard's URL, the control store's address, and the environment that reaches it."""

    url: str
    address: str
    environment: dict[str, str]
    _raylet: "_Started"

    def processes(self) -> list[int]:
        """The ids of all processes of the head, Ray's workers included."""
        return self._raylet.processes()

    def kill(self) -> None:
        """Ends them all at once, as a machine does that loses its power."""
        self._raylet.kill()

    def start_again(self) -> None:
        """Starts a killed head with the same words, ports and folder; returns when its dashboard answers."""
        self._raylet.start()
        _wait_for(lambda: answers(self.url), self._raylet)


@contextmanager
def own_cluster(
    *, head_cpus: int = 4, nodes: tuple[int, ...] = (), head_words: tuple[str, ...] = (), **variables: str
) -> Iterator[Head]:
    """A head, and a raylet with so many logical CPUs for each number in `nodes`; all were up to the end, or it fails.

    `head_words` are further options of `ray start --head`, the variables are set for every node.

    Nobody has activated the environment that Ray is started from: it is not on the PATH.
    """
    gcs, dashboard, client = free_ports(3)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    here = Path(sys.executable).parent
    elsewhere = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != here]
    environment = inherited | {"PATH": os.pathsep.join(elsewhere), "RAY_AUTH_TOKEN": TOKEN}
    url, address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
    with ExitStack() as stack:
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        start = stack.enter_context
        words = ["--head", f"--num-cpus={head_cpus}", *ports, *_agent_ports(), *head_words]
        head = start(_raylet(words, environment | variables))
        _wait_for(lambda: answers(url), head)
        for cpus in nodes:
            words = [f"--address={address}", f"--num-cpus={cpus}", *_agent_ports()]
            start(_raylet(words, environment | variables))
        yield Head(url, address, environment, head)


def _agent_ports() -> list[str]:
    """A raylet whose agents say only after 15 s which ports they chose ends itself; with these it need not ask."""
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return [f"--{name}-port={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now, outside the range of Ray's workers (10002–19999)."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def answers(url: str) -> bool:
    """Whether a dashboard is up."""
    try:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class _Started:
    """`ray start` in a session of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._command, self._environment, self._folder, self.log = command, environment, folder, folder / "log"
        self.start()

    def start(self) -> None:
        # Left by one that was killed; with it Ray takes a raylet that still looks for that head for the head itself.
        (self._folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> list[int]:
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in pids if _session(pid) == self.process.pid]

    def kill(self) -> None:
        for pid in self.processes():  # a graceful end takes half a minute
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _session(pid: int) -> int:
    """The session of a process, which its children share: a worker of Ray is in a process group of its own."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:  # ended meanwhile
        return -1


@contextmanager
def _raylet(words: list[str], environment: dict[str, str]) -> Iterator[_Started]:
    folder = Path(tempfile.mkdtemp(prefix="pixellm-ray-", dir="/tmp"))  # short: Ray keeps sockets below it
    command = [f"{Path(sys.executable).parent}/ray", "start", "--block", "--disable-usage-stats", *words]
    command.append(f"--temp-dir={folder}/ray")  # else two raylets unpack a job's packages into one folder, at once
    started = _Started(command, environment | _VARIABLES | {"RAY_TMPDIR": f"{folder}/ray"}, folder)
    try:
        yield started
        assert started.process.poll() is None, started.log.read_text()
    finally:
        started.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(is_true: object, started: _Started) -> None:
    assert callable(is_true)
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert started.process.poll() is None, started.log.read_text()
        assert time.monotonic() < deadline, started.log.read_text()
        time.sleep(0.2)
