"""Puts a model on Ray Serve: `deploy` for programs, `serve_forever` for the command line.

The driver looks the reference up once and pins it; replicas load exactly that version. Deploying is watched here rather
than left to Serve: a model that does not load, or resources that nobody has, end in one line instead of a wait without
end.
"""

import logging
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

import httpx

from pixellm import errors
from pixellm.errors import PixelLMError, ServingError
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.settings import ServeSettings, Settings, TrackingSettings, from_environment
from pixellm.serve.model_card import ModelCard, pin
from pixellm.serve.port_check import check_port_is_free

APP_NAME = "pixellm"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"

_POLL_S = 0.1
_SHUTDOWN_LIMIT_S = 30.0
_CONTROLLER, _SERVE_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
_RAISED_LINE = re.compile(r"pixellm\.errors\.(\w+): (.+)")


@dataclass
class ServiceHandle:
    """A running service; also a context manager that stops it.

    Attributes:
        host: address that is listened on.
        port: its port.
        card: the model version that is served.
        app_name: the Serve application.
        owns_serve: whether Ray Serve was started for it and ends with it.
    """

    host: str
    port: int
    card: ModelCard
    app_name: str = APP_NAME
    owns_serve: bool = True
    _is_stopped: bool = field(default=False, repr=False)

    @property
    def url(self) -> str:
        """`http://HOST:PORT`, where the page and the API are."""
        address = _reachable(self.host)
        return f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"

    def stop(self) -> None:
        """Takes the service down; Ray itself goes on. Further calls do nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        _take_down(self.app_name, self.owns_serve, self.host, self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def deploy(
    settings: ServeSettings,
    model_ref: str,
    *,
    host: str | None = None,
    port: int | None = None,
    tracking: TrackingSettings | None = None,
    app_name: str = APP_NAME,
) -> ServiceHandle:
    """Serves a model on the Ray cluster that this process is connected to, and returns when it answers.

    Args:
        settings: limits, replicas, autoscaling.
        model_ref: a folder, `models:/NAME@alias` or `models:/NAME/VERSION`.
        host: overrides `settings.host`.
        port: overrides `settings.port`.
        tracking: the registry; None means the default store.
        app_name: name of the Serve application.

    Returns:
        The handle, with the URL.

    Raises:
        ModelLoadError: the reference does not exist or the model does not load in a replica.
        TrackingError: the registry cannot be opened.
        ServingError: the port is taken, resources are missing, or nothing answered within `start_timeout_s`.
    """
    host, port = host or settings.host, port or settings.port
    tracking = _with_absolute_root(tracking or TrackingSettings())
    card = pin(model_ref, tracking)
    _quieten_serve()
    owns_serve = _start_serve(host, port)
    service = ServiceHandle(host, port, card, app_name, owns_serve)
    try:
        _run_application(build_application(settings, card, tracking, app_name), app_name)
        deadline = time.monotonic() + settings.start_timeout_s
        _wait_until_running(app_name, settings, deadline)
        _wait_until_it_answers(service.url, deadline)
    except BaseException:
        service.stop()
        raise
    return service


def build_application(settings: ServeSettings, card: ModelCard, tracking: TrackingSettings, app_name: str) -> Any:
    """The Serve application: the ingress bound to the engine deployment.

    Returns:
        `ray.serve.Application`.
    """
    from ray import serve  # slow

    from pixellm.serve.ingress import Ingress
    from pixellm.serve.replica import EngineReplica

    logging_config = {"log_level": "WARNING", "enable_access_log": False}
    engine = serve.deployment(
        EngineReplica,
        name=ENGINE_DEPLOYMENT,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "initial_replicas": max(1, settings.min_replicas),
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=1,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=logging_config,
    )
    room = settings.max_ongoing_requests * settings.max_replicas + settings.max_queued_requests
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        # More than the engines take: the ingress itself must never be what queues, and health checks need room.
        max_ongoing_requests=2 * room + 64,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=logging_config,
    )
    return ingress.bind(engine.bind(card, settings, tracking), settings, card, app_name)


def serve_forever(settings: Settings, model_ref: str, *, host: str | None = None, port: int | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM, then stops cleanly. Starts a local Ray cluster where none is connected.

    Raises:
        As `deploy`; ClusterError when Ray cannot be reached.
    """
    pin(model_ref, settings.tracking)
    if (settings.cluster.address or from_environment().get("RAY_ADDRESS") or "local") == "local":
        check_port_is_free(host or settings.serve.host, port or settings.serve.port)
    cluster = connect(settings.cluster)
    try:
        service = deploy(settings.serve, model_ref, host=host, port=port, tracking=settings.tracking)
        with service, _StopSignal() as stop:
            _say_how_to_use(service)
            stop.wait()
            print("stopping: open requests are finished first", flush=True)
    finally:
        if cluster.is_ours:
            disconnect()


def _say_how_to_use(service: ServiceHandle) -> None:
    card = service.card
    print(
        f"{card.id} (version {card.version}) answers at {service.url}\n"
        f"  page     {service.url}/\n"
        f"  query    curl {service.url}/v1/segment -F image=@photo.jpg -F 'prompt=Segment the cat.'\n"
        f"  openai   OpenAI(base_url='{service.url}/v1', api_key='none')\n"
        f"  metrics  {service.url}/metrics\n"
        "Ctrl-C stops it.",
        flush=True,
    )


class _StopSignal:
    """Context in which Ctrl-C and SIGTERM set an event, so that the service is taken down in order."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()

        def handle(_number: int, _frame: FrameType | None) -> None:
            event.set()

        self._before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return event

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _start_serve(host: str, port: int) -> bool:
    """Starts Serve's proxy; False when Serve runs on this cluster already, at the same address."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client  # the public API does not tell where a running proxy listens

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
    with suppress(RayActorError):  # a slow proxy is replaced by the controller; `_wait_until_it_answers` waits for it
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            controller_options={"runtime_env": {"env_vars": {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}}},
        )
    return True


def _run_application(application: Any, app_name: str) -> None:
    """Hands the application to Serve without waiting for it."""
    from ray.serve.api import RunTarget, run_many

    try:
        run_many([RunTarget(application, name=app_name, route_prefix="/")], wait_for_applications_running=False)
    except RuntimeError as error:
        raise ServingError(f"Ray Serve did not take the application: {str(error).splitlines()[0]}") from None


def _wait_until_running(app_name: str, settings: ServeSettings, deadline: float) -> None:
    from ray import serve

    while True:
        application = serve.status().applications.get(app_name)
        state = "NOT_STARTED" if application is None else str(application.status.value)
        if state == "RUNNING":
            return
        if application is not None and state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise _deployment_error(application)
        if time.monotonic() > deadline:
            raise ServingError(
                f"the service was not up after {settings.start_timeout_s:g} s (serve.start_timeout_s); a replica asks "
                f"for {settings.replica_cpus:g} CPUs and {settings.replica_gpus:g} GPUs{_free_resources()}"
            )
        time.sleep(_POLL_S)


def _deployment_error(application: Any) -> PixelLMError:
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


def _wait_until_it_answers(url: str, deadline: float) -> None:
    """The proxy learns its routes a moment after the application runs."""
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise ServingError(
                f"the service runs, but {url}/readyz does not answer; a firewall or proxy may be in between"
            )
        time.sleep(_POLL_S)


def _take_down(app_name: str, owns_serve: bool, host: str, port: int) -> None:
    """Ends the application, and Serve with it where this process started it; then nothing listens there any more."""
    from ray import serve

    if not owns_serve:
        serve.delete(app_name)
        return
    _shut_serve_down()
    deadline = time.monotonic() + _SHUTDOWN_LIMIT_S
    with suppress(OSError):  # refused: the proxy is gone
        while time.monotonic() < deadline:
            socket.create_connection((_reachable(host), port), timeout=1).close()
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


def _with_absolute_root(tracking: TrackingSettings) -> TrackingSettings:
    """Replicas have another working directory."""
    from pathlib import Path

    return tracking.model_copy(update={"root": str(Path(tracking.root).absolute())})


def _reachable(host: str) -> str:
    """An address that a client on this machine can use for a listening address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
