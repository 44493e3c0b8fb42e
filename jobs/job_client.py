"""Ray's job server, reached with a deadline and with the token that it wants, and one job on it."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import urlsplit

from pixellm.errors import ClusterError, ConfigError
from pixellm.platform.cluster import is_local_host, probe, use_local_token
from pixellm.platform.settings import from_environment

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL_S = 0.5
_ANSWER_TIMEOUT_S = 10.0
_HEAD_TIMEOUT_S = 60.0
_TOKEN_HELP = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token that its head was started with"
)
EXIT_STOPPED = 130


class JobHandle:
    """A submitted job."""

    def __init__(self, client: Any, job_id: str) -> None:
        """Use `submit` or `JobHandle.open`."""
        self._client = client
        self.job_id = job_id

    @classmethod
    def open(cls, job_id: str, address: str | None) -> "JobHandle":
        """A handle on a job that was submitted before.

        Raises:
            ClusterError: the cluster does not answer, or has no such job.
        """
        handle = cls(open_client(address), job_id)
        handle.status()
        return handle

    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.

        Raises:
            ClusterError: the cluster does not answer, or has no such job.
        """
        with cluster_errors(f"job {self.job_id}"):
            return str(self._client.get_job_status(self.job_id).value)

    def logs(self) -> str:
        """Everything the job has printed so far.

        Raises:
            ClusterError: as `status`.
        """
        with cluster_errors(f"job {self.job_id}"):
            return str(self._client.get_job_logs(self.job_id))

    def follow(self, stream: TextIO | None = None) -> int:
        """Prints what the job prints until it ends; returns its exit code.

        Args:
            stream: where it goes; standard output unless given.

        Raises:
            ClusterError: the cluster went away.
        """
        asyncio.run(self._copy_logs(stream or sys.stdout))
        return self.wait()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end of the job.

        Args:
            timeout_s: seconds at most; None waits for ever.

        Returns:
            The exit code of its command; 130 when it was stopped, 1 when it never started.

        Raises:
            ClusterError: the cluster went away, or the job runs on after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.status() not in ENDED:
            if deadline is not None and time.monotonic() > deadline:
                raise ClusterError(f"job {self.job_id} still runs after {timeout_s:g} s; it was left running")
            time.sleep(_POLL_S)
        return self.exit_code()

    def exit_code(self) -> int:
        """The exit code of an ended job: its command's; 130 when stopped, 1 when it never started."""
        with cluster_errors(f"job {self.job_id}"):
            details = self._client.get_job_info(self.job_id)
        if details.status.value == "SUCCEEDED":
            return 0
        if details.status.value == "STOPPED":
            return EXIT_STOPPED
        return details.driver_exit_code or 1

    def message(self) -> str:
        """Ray's sentence on the state of the job."""
        with cluster_errors(f"job {self.job_id}"):
            return str(self._client.get_job_info(self.job_id).message or "")

    def stop(self) -> bool:
        """Asks the job to stop (Ctrl-C, then after two minutes kill); returns whether it was running.

        Raises:
            ClusterError: as `status`.
        """
        with cluster_errors(f"job {self.job_id}"):
            return bool(self._client.stop_job(self.job_id))

    async def _copy_logs(self, stream: TextIO) -> None:
        import aiohttp  # slow; Ray's job client is built on it

        num_seen = 0  # the stream starts anew after a lost connection: skip what was printed
        while True:
            position = 0
            try:
                async for chunk in self._client.tail_job_logs(self.job_id):
                    fresh = chunk[max(0, num_seen - position) :]
                    position += len(chunk)
                    if fresh:
                        num_seen = position
                        print(fresh, end="", file=stream, flush=True)
            except (OSError, RuntimeError, aiohttp.ClientError):
                pass  # whether the cluster is gone, `status` says
            if self.status() in ENDED:
                return
            await asyncio.sleep(_POLL_S)


def open_client(address: str | None) -> Any:
    """Ray's `JobSubmissionClient` on a dashboard, connected: probed first, with the token where one is wanted.

    Raises:
        ConfigError: the address is not http://host:port.
        ClusterError: nothing answers there, or it refuses us.
    """
    from ray.job_submission import JobSubmissionClient  # slow (1 s)

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they announce each upload and connection
    url = dashboard_url(address)
    parts = urlsplit(url)
    probe(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), "Ray dashboard")
    _present_token(url)
    with cluster_errors(f"the Ray dashboard at {url}"), _addressed(url):
        return JobSubmissionClient(url)


def submit_job(client: Any, **job: Any) -> str:
    """Submits a job, waiting for a head that has just started: for its first seconds no node of it takes jobs.

    Args:
        client: from `open_client`.
        job: arguments of Ray's `submit_job`.

    Returns:
        The job's id.

    Raises:
        RuntimeError: Ray refused the job, or no node took it within a minute.
    """
    deadline = time.monotonic() + _HEAD_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def dashboard_url(address: str | None) -> str:
    """The dashboard that an address names; None: what the environment names.

    Raises:
        ConfigError: there is none, or it is not http://host:port.
    """
    known = from_environment()
    url = address or known.get("RAY_API_SERVER_ADDRESS") or known.get("RAY_ADDRESS")
    if url is None:
        raise ConfigError("no cluster is named; give --address http://HEAD:8265, the dashboard that `ray start` prints")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # "http://[::1", a port beyond 65535
        is_address = False
    if not is_address:
        raise ConfigError(f"the address {url!r} is not the dashboard's http://HEAD:8265, which `ray start` prints")
    return url.rstrip("/")


def is_head_here(url: str) -> bool:
    """Whether the head runs on this machine, and not behind a tunnel that ends here.

    Raises:
        ClusterError: the cluster is not ready.
    """
    if not is_local_host(urlsplit(url).hostname or ""):
        return False
    from ray.util.state import list_nodes  # slow
    from ray.util.state.exception import RayStateApiException

    deadline = time.monotonic() + _HEAD_TIMEOUT_S
    reason = "it lists no head node"
    while time.monotonic() < deadline:  # the dashboard answers some seconds before it knows its own node
        try:
            with _addressed(url):
                heads = list_nodes(address=url, filters=[("is_head_node", "=", "True")], timeout=int(_ANSWER_TIMEOUT_S))
        except RayStateApiException as error:
            reason = (str(error).splitlines() or [""])[0][:200]
        else:
            if heads:
                return is_local_host(heads[0].node_ip)
        time.sleep(_POLL_S)
    raise ClusterError(
        f"the cluster at {url} is not ready after {_HEAD_TIMEOUT_S:g} s: {reason}; is it still starting?"
    )


@contextmanager
def cluster_errors(what: str) -> Iterator[None]:
    """Turns what Ray's client raises into one `ClusterError` line."""
    import requests  # slow; Ray's job client is built on it
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"{what} refuses our token; {_TOKEN_HELP}") from error
    except (RuntimeError, OSError, RayError, requests.RequestException, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ClusterError(f"{what}: {lines[-1].strip()[:400]}") from error


@contextmanager
def _addressed(url: str) -> Iterator[None]:
    """Ray lets its environment variables win over the address that it is given: for a while, they say the same."""
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)


def _present_token(url: str) -> None:
    """Presents Ray's token where the cluster wants one and is this machine; elsewhere the user says so."""
    import requests  # slow; Ray's job client is built on it

    try:
        answer = requests.get(f"{url}/api/authentication_mode", timeout=_ANSWER_TIMEOUT_S)
        mode = answer.json().get("authentication_mode") if answer.ok else "disabled"  # older clusters know no tokens
    except (requests.RequestException, ValueError, AttributeError):
        raise ClusterError(
            f"what answers at {url} is not a Ray dashboard; give --address http://HEAD:8265, which `ray start` prints"
        ) from None
    if mode != "token":
        return
    from ray._private.authentication.authentication_utils import is_token_auth_enabled  # slow; no public equal

    is_presented = use_local_token() if is_local_host(urlsplit(url).hostname or "") else is_token_auth_enabled()
    if not is_presented:
        raise ClusterError(f"the cluster at {url} wants a token; {_TOKEN_HELP}")
