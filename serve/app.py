"""Puts a model on Ray Serve: `deploy` for programs, `serve_forever` for the command line.

The driver looks the reference up once and pins it; replicas load exactly that version.
"""

import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.settings import ServeSettings, Settings, TrackingSettings, from_environment
from pixellm.platform.tracking import store_address
from pixellm.serve.controller import (
    reachable,
    run_application,
    start_serve,
    take_down,
    wait_until_it_answers,
    wait_until_running,
)
from pixellm.serve.model_card import ModelCard, pin
from pixellm.serve.port_check import check_port_is_free

APP_NAME = "pixellm"
ENGINE_DEPLOYMENT = "engine"
INGRESS_DEPLOYMENT = "ingress"

_WAKE_UP_S = 0.5


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
        address = reachable(self.host)
        return f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"

    def stop(self) -> None:
        """Takes the service down; Ray itself goes on. Further calls do nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        take_down(self.app_name, self.owns_serve, self.host, self.port)

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
    tracking = _for_replicas(tracking or TrackingSettings())
    card = pin(model_ref, tracking)
    owns_serve = start_serve(host, port)
    service = ServiceHandle(host, port, card, app_name, owns_serve)
    try:
        run_application(build_application(settings, card, tracking, app_name), app_name)
        deadline = time.monotonic() + settings.start_timeout_s
        wait_until_running(app_name, settings, deadline)
        wait_until_it_answers(service.url, deadline)
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
            while not stop.wait(_WAKE_UP_S):  # a signal that another thread takes does not end a wait without end
                continue
            print("stopping when the open requests are answered; Ctrl-C again stops at once", flush=True)
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


def _for_replicas(tracking: TrackingSettings) -> TrackingSettings:
    """The same registry, said so that a process with another working directory and environment finds it."""
    root = tracking.root if "://" in tracking.root else str(Path(tracking.root).absolute())
    return tracking.model_copy(update={"root": root, "uri": store_address(tracking, make_folder=False)})
