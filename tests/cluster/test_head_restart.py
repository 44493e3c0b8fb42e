"""The head is killed while the service is asked, stays away, and comes back over the same Redis.

The control store's tables are in a Redis of our own, and every node has a proxy. Questions go over connections that the
worker's proxy accepted, as from a load balancer that leaves the head out. A question in flight through the head's own
proxy is not part of the claim: its connection breaks with the head, and the ingress replica that was answering it then
answers nobody until the control store is back (Ray blocks its event loop in `WaitAllObjectsReported`; the questions
that wait meanwhile are answered later). docs/operations.md says what follows for a deployment.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pixellm import PixelLMClient, PixelLMEngine
from pixellm.errors import PixelLMError
from tests.cluster.own_cluster import TOKEN, Head, free_ports, own_cluster

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY))  # for `from benchmarks import …`

from benchmarks.serve_case import (  # noqa: E402
    MAX_NEW_TOKENS,
    QUESTION,
    QUICK_ANSWER,
    Expected,
    expected_answer,
    photo_bytes,
    save_case,
)

pytestmark = pytest.mark.drill

_DEADLINE_S = 120
_AWAY_S = 10
_REDIS_PASSWORD = "drill-password"
_BIN = Path(sys.executable).parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Tally:
    """What became of the questions: when each right answer came, and everything else as text."""

    right_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Story:
    """What happened: the questions, and the moments (monotonic seconds) between which no head ran."""

    tally: Tally
    killed_s: float
    started_again_s: float
    job_before: str


@pytest.fixture(scope="module")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis as `deploy/kuberay` starts it, with its password; yields its address."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.fail("no redis-server on this machine: install Debian's package `redis-server`")
    [port] = free_ports(1)
    folder = tmp_path_factory.mktemp("redis")
    words = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), *_redis_arguments()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([program, *words], stdout=log, stderr=log)
    try:
        _wait(lambda: _listens(port) or process.poll() is not None, "Redis does not come up")
        assert process.poll() is None, (folder / "log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _redis_arguments() -> list[str]:
    manifest = REPOSITORY / "deploy" / "kuberay" / "base" / "redis.yaml"
    [redis] = [item for item in yaml.safe_load_all(manifest.read_text()) if item["kind"] == "StatefulSet"]
    [container] = redis["spec"]["template"]["spec"]["containers"]
    return [_REDIS_PASSWORD if word == "$(REDIS_PASSWORD)" else word for word in container["args"]]


@pytest.fixture(scope="module")
def head(redis_address: str) -> Iterator[Head]:
    """A head without logical CPUs, and a node with two, which waits for a head as long as KubeRay lets its workers."""
    with own_cluster(
        head_cpus=0,
        nodes=(2,),
        head_words=(f"--redis-password={_REDIS_PASSWORD}",),
        RAY_REDIS_ADDRESS=redis_address,
        RAY_external_storage_namespace="drill",
        RAY_gcs_rpc_server_reconnect_timeout_s="600",
        RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS="1",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model whose answer to `QUESTION` is known."""
    return save_case(tmp_path_factory.mktemp("model"), "tiny", QUICK_ANSWER)


@pytest.fixture(scope="module")
def expected(model: Path) -> Expected:
    """The direct engine's answer."""
    with PixelLMEngine.from_pretrained(model) as engine:
        return expected_answer(engine, photo_bytes())


@pytest.fixture(scope="module")
def service(head: Head, model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`serve deploy` of serve/config.yaml with a proxy on every node; returns the URL once all of it runs."""
    [port] = free_ports(1)
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config |= {"proxy_location": "EveryNode", "http_options": {"host": "127.0.0.1", "port": port}}
    config["applications"][0]["args"] = {"models": [str(model)], "overrides": ["serve.max_replicas=1"]}
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(_BIN / "serve"), "deploy", str(file), "--address", head.url]
    done = subprocess.run(command, env=_environment(head), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    url = f"http://127.0.0.1:{port}"
    _wait(lambda: _is_whole(head, url), "the service does not come up")
    return url


@pytest.fixture(scope="module")
def pixellm(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `pixellm WORDS --address URL`."""
    here = tmp_path_factory.mktemp("user")

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "pixellm.cli", *words, "--address", head.url]
        return subprocess.run(
            command, cwd=here, env=_environment(head), capture_output=True, text=True, check=False, timeout=_DEADLINE_S
        )

    return run


@pytest.fixture(scope="module")
def story(head: Head, service: str, expected: Expected, pixellm: Run) -> Story:
    """A job ends, questions are asked without a pause, the head goes and comes back, and they are still asked."""
    job_before = _asked_in_a_job(pixellm, service)
    tally = Tally()
    with _asking(head, service, expected, tally):
        _wait_for_answers(tally, 6)
        head.kill()
        killed_s = time.monotonic()
        _wait(lambda: time.monotonic() > killed_s + _AWAY_S, "time stands still")
        _wait_for_answers(tally, 6)
        started_again_s = time.monotonic()
        head.start_again()
        _wait(lambda: _is_whole(head, service), "the cluster is not whole again")
        _wait_for_answers(tally, 6)
    return Story(tally, killed_s, started_again_s, job_before)


def test_every_question_is_answered_right_before_while_and_after_the_head_is_away(story: Story) -> None:
    assert story.tally.failures == []
    while_away = [moment for moment in story.tally.right_s if story.killed_s < moment < story.started_again_s]
    assert len(while_away) >= 6
    # Nothing was hidden by asking again: each asker had one connection from beginning to end.
    assert len(story.tally.connections) == 2


def test_new_connections_reach_either_proxy_and_are_answered_right(
    story: Story, service: str, expected: Expected
) -> None:
    for _ in range(6):
        with PixelLMClient(service, max_retries=0) as client:
            assert _ask(client) == expected


def test_an_engine_that_is_killed_afterwards_is_replaced(
    story: Story, head: Head, service: str, expected: Expected
) -> None:
    [before] = _engines(head)
    os.kill(before, signal.SIGKILL)
    _wait(lambda: _engines(head) not in ([], [before]) and _is_whole(head, service), "no new engine comes")
    with PixelLMClient(service) as client:
        assert _ask(client) == expected


def test_a_job_from_before_is_listed_and_another_runs(story: Story, pixellm: Run, service: str) -> None:
    listed = pixellm("jobs", "list")
    assert f"{story.job_before}  SUCCEEDED" in listed.stdout, listed.stdout + listed.stderr
    assert _asked_in_a_job(pixellm, service) != story.job_before


def _asked_in_a_job(pixellm: Run, url: str) -> str:
    """The id of a job that asked the service one question."""
    photo = REPOSITORY / "platform" / "data" / "demo" / "images" / "000000196393.jpg"
    done = pixellm("submit", "query", str(photo), QUESTION, "--url", url, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[1]


@contextmanager
def _asking(head: Head, url: str, expected: Expected, tally: Tally) -> Iterator[None]:
    """Two askers, each over one connection that the worker's proxy has accepted."""
    transports = [_connected(head, url, tally) for _ in range(2)]
    is_over = threading.Event()

    def ask(transport: httpx.HTTPTransport) -> None:
        with PixelLMClient(url, max_retries=0, transport=transport) as client:
            while not is_over.wait(0.05):
                try:
                    got = _ask(client)
                except PixelLMError as error:
                    tally.failures.append(f"{time.monotonic():.1f} {type(error).__name__}: {error}")
                else:
                    tally.failures += [] if got == expected else [f"wrong: {got.text}"]
                    tally.right_s.append(time.monotonic())

    threads = [threading.Thread(target=ask, args=(transport,), daemon=True) for transport in transports]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(_DEADLINE_S)
        assert not any(thread.is_alive() for thread in threads), "a question without an end"


def _ask(client: PixelLMClient) -> Expected:
    result = client.segment(photo_bytes(), QUESTION, max_tokens=MAX_NEW_TOKENS)
    return Expected(result.text, tuple(target.rle for target in result.targets))


class _Noted(httpx.HTTPTransport):
    """Notes the local port of each connection that something was answered over."""

    def __init__(self, ports: set[int]) -> None:
        super().__init__(limits=httpx.Limits(max_connections=1))
        self.ports = ports

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        self.ports.add(response.extensions["network_stream"].get_extra_info("client_addr")[1])
        return response


def _connected(head: Head, url: str, tally: Tally) -> _Noted:
    """Connects until it is not the head's proxy that accepts: both listen on one port, and the system chooses."""
    for _ in range(50):
        ports: set[int] = set()
        transport = _Noted(ports)
        transport.handle_request(httpx.Request("GET", f"{url}/healthz")).read()
        if not _is_held_by(head, httpx.URL(url).port or 80, *ports):
            tally.connections |= ports
            transport.ports = tally.connections
            return transport
        transport.close()
    raise AssertionError("50 connections went to the head's proxy")


def _is_held_by(head: Head, port: int, client_port: int) -> bool:
    """Whether a process of the head has the far end of a connection of ours."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = (f":{port:04X}", f":{client_port:04X}")
    [inode] = [line[9] for line in lines if (line[1][-5:], line[2][-5:]) == ends]
    for pid in head.processes():
        with suppress(OSError):  # ended meanwhile
            if any(os.readlink(entry) == f"socket:[{inode}]" for entry in Path(f"/proc/{pid}/fd").iterdir()):
                return True
    return False


def _environment(head: Head) -> dict[str, str]:
    return head.environment | {"RAY_AUTH_MODE": "token"}


def _state(head: Head, path: str) -> dict[str, Any]:
    """What the dashboard says; nothing while it does not answer."""
    try:
        answer = httpx.get(f"{head.url}{path}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5)
    except httpx.TransportError:
        return {}
    return dict(answer.json()) if answer.status_code == 200 else {}


def _is_whole(head: Head, url: str) -> bool:
    """Two nodes are alive, one of them a head; both have a healthy proxy; all applications run; the model answers."""
    nodes = _state(head, "/api/v0/nodes").get("data", {}).get("result", {}).get("result", [])
    alive = [node["is_head_node"] for node in nodes if node["state"] == "ALIVE"]
    serve = _state(head, "/api/serve/applications/")
    proxies = [proxy["status"] for proxy in serve.get("proxies", {}).values()]
    applications = [application["status"] for application in serve.get("applications", {}).values()]
    if (sorted(alive), proxies, applications) != ([False, True], ["HEALTHY"] * 2, ["RUNNING"] * 2):
        return False
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _engines(head: Head) -> list[int]:
    """Processes of the engines that run, as Serve's controller sees them."""
    applications = _state(head, "/api/serve/applications/").get("applications", {}).values()
    engines = [application["deployments"].get("engine", {"replicas": []}) for application in applications]
    return [replica["pid"] for engine in engines for replica in engine["replicas"] if replica["state"] == "RUNNING"]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_for_answers(tally: Tally, count: int) -> None:
    goal = len(tally.right_s) + count
    _wait(lambda: len(tally.right_s) >= goal or bool(tally.failures), f"{count} more answers do not come")


def _wait(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
