"""Ray Serve's controller as we use it: start it, hand it an application, watch that come up, take it down.

Watched here rather than left to `serve.run`: a model that does not load, or resources that nobody has, end in one line
instead of a wait without end.
"""

import logging
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx

from pixellm import errors
from pixellm.errors import PixelLMError, ServingError
from pixellm.platform.settings import ServeSettings
from pixellm.serve.port_check import check_port_is_free

_POLL_S = 0.1
# Controller, proxy and replicas inherit them. One event loop per process instead of three: a request changes threads
# less often. A replica that is ill is killed at once: stopped gently, a stuck engine holds its questions until they are
# too old to be sent again (measured: 78 s until it was replaced, both questions in flight lost).
_SERVE_VARIABLES = {
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_SHUTDOWN_LIMIT_S = 30.0
_CONTROLLER, _SERVE_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
_RAISED_LINE = re.compile(r"pixellm\.errors\.(\w+): (.+)")


def start_serve(host: str, port: int) -> bool:
    """Starts Serve on the connected cluster, listening at `host:port`.

    Returns:
        False when Serve runs there already, at the same address; then it is not this process's to shut down.

    Raises:
        ServingError: the port is taken, or Serve listens elsewhere.
    """
    from ray import serve  # slow, here and below
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client  # the public API does not tell where a running proxy listens

    _quieten_serve()
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        options = client.http_config
        if (options.host, options.port) != (host, port):
            raise ServingError(
                f"Ray Serve already runs on this cluster at {options.host}:{options.port}, and cannot also listen at "
                f"{host}:{port}; use --host {options.host} --port {options.port}, or stop it with `serve shutdown`"
            )
        return False
    check_port_is_free(host, port)
    with suppress(RayActorError):  # a slow proxy is replaced by the controller; `wait_until_it_answers` waits for it
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            controller_options={"runtime_env": {"env_vars": _SERVE_VARIABLES}},
        )
    return True


def run_applications(applications: Sequence[tuple[Any, str, str | None]]) -> None:
    """Hands applications to Serve without waiting for them.

    Args:
        applications: (application, its name, its route; None where only handles reach it).

    Raises:
        ServingError: Serve refuses them (another application has the route).
    """
    from ray.serve.api import RunTarget, run_many

    targets = [RunTarget(application, name=name, route_prefix=route) for application, name, route in applications]
    try:
        run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RuntimeError as error:
        raise ServingError(f"Ray Serve did not take the application: {str(error).splitlines()[0]}") from None


def wait_until_running(app_name: str, settings: ServeSettings, deadline: float) -> None:
    """Returns when every deployment of the application runs.

    Raises:
        PixelLMError: what a replica raised while it started, as the same error in this process.
        ServingError: not before `deadline` (monotonic seconds); the message names what a replica asks for.
    """
    from ray import serve

    while True:
        application = serve.status().applications.get(app_name)
        state = "NOT_STARTED" if application is None else str(application.status.value)
        if state == "RUNNING":
            return
        if application is not None and state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise deployment_error(application)
        if time.monotonic() > deadline:
            raise ServingError(
                f"the service was not up after {settings.start_timeout_s:g} s (serve.start_timeout_s); a replica asks "
                f"for {settings.replica_cpus:g} CPUs and {settings.replica_gpus:g} GPUs{_free_resources()}"
            )
        time.sleep(_POLL_S)


def deployment_error(application: Any) -> PixelLMError:
    """The replica's own exception out of Serve's report, as one line of its own kind."""
    messages = [str(deployment.message) for deployment in application.deployments.values() if deployment.message]
    text = "\n".join([str(application.message), *messages])
    raised = _RAISED_LINE.findall(text)
    if raised:
        name, message = raised[-1]
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, PixelLMError):
            return kind(message)
        return ServingError(message)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ServingError(f"a replica did not start: {lines[-1] if lines else 'Ray Serve gives no reason'}")


def _free_resources() -> str:
    import ray

    free = ray.available_resources()
    return f", free on the cluster are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def wait_until_it_answers(url: str, deadline: float) -> None:
    """Returns when `/readyz` is good: the proxy learns its routes a moment after the application runs.

    Raises:
        ServingError: not before `deadline` (monotonic seconds).
    """
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise ServingError(
                f"the service runs, but {url}/readyz does not answer; a firewall or proxy may be in between"
            )
        time.sleep(_POLL_S)


def take_down(app_name: str, owns_serve: bool, host: str, port: int) -> None:
    """Ends the application, open requests first, then its engines, and Serve where this process started it.

    When it returns in the second case, nothing listens at `host:port` any more.
    """
    from ray import serve

    with suppress(TimeoutError):  # a request that does not end: Serve kills its replica after the graceful time
        serve.delete(app_name)
        for engines in [name for name in serve.status().applications if name.startswith(f"{app_name}.")]:
            serve.delete(engines)
    if not owns_serve:
        return
    _shut_serve_down()
    deadline = time.monotonic() + _SHUTDOWN_LIMIT_S
    with suppress(OSError):  # refused: the proxy is gone
        while time.monotonic() < deadline:
            socket.create_connection((reachable(host), port), timeout=1).close()
            time.sleep(_POLL_S)


def _shut_serve_down() -> None:
    """`serve.shutdown`, but asked not to wait inside the controller.

    There the call dies with the controller, and Ray prints to the terminal that a task failed.
    """
    import ray
    from ray import serve

    with suppress(ValueError, ray.exceptions.RayActorError):  # ValueError: no such actor, it is gone
        controller = ray.get_actor(_CONTROLLER, namespace=_SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(False))
        deadline = time.monotonic() + _SHUTDOWN_LIMIT_S
        while time.monotonic() < deadline:
            ray.get_actor(_CONTROLLER, namespace=_SERVE_NAMESPACE)
            time.sleep(_POLL_S)
    serve.shutdown()


def _quieten_serve() -> None:
    """Serve logs each step of a deployment to the driver's terminal; we print what matters."""
    from ray import serve

    logging.getLogger(serve.__name__).setLevel(logging.WARNING)


def reachable(host: str) -> str:
    """An address that a client on this machine can use for a listening address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
