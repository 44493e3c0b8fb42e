"""Puts a model on Ray Serve: `deploy` for programs, `serve_forever` for the command line.

The driver looks the reference up once and pins it; replicas load exactly that version.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

from pixellm.errors import ConfigError
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.settings import (
    ServeSettings,
    Settings,
    TrackingSettings,
    from_environment,
    load_settings,
)
from pixellm.platform.tracking import from_any_folder, store_address
from pixellm.serve.auth import ApiKey, check_exposure, read_keys
from pixellm.serve.controller import (
    reachable,
    run_applications,
    start_serve,
    take_down,
    wait_until_it_answers,
    wait_until_running,
)
from pixellm.serve.ingress import ENGINE_DEPLOYMENT
from pixellm.serve.model_card import ModelCard, pin
from pixellm.serve.port_check import check_port_is_free
from pixellm.serve.roster import Track, engine_app_name, parse_canary

APP_NAME = "pixellm"
INGRESS_DEPLOYMENT = "ingress"
FLEET_DEPLOYMENT = "fleet"

#: How long a freed place on a replica may wait for a queued question: Serve looks again that often.
_LONGEST_WAIT_FOR_ROOM_S = 0.1
_WAKE_UP_S = 0.5
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


@dataclass
class ServiceHandle:
    """A running service; also a context manager that stops it.

    Attributes:
        host: address that is listened on.
        port: its port.
        card: the version of the first model that was served at the start.
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
    model_ref: str | Sequence[str],
    *,
    canaries: Sequence[str] = (),
    host: str | None = None,
    port: int | None = None,
    tracking: TrackingSettings | None = None,
    app_name: str = APP_NAME,
) -> ServiceHandle:
    """Serves models on the Ray cluster that this process is connected to, and returns when they answer.

    Args:
        settings: limits, replicas, autoscaling.
        model_ref: a folder, `models:/NAME@alias` or `models:/NAME/VERSION`; several are served by their names, the
            first is the default. An alias is followed when it moves.
        canaries: `REFERENCE=PERCENT%` each, a share of the traffic of a served model of the same name.
        host: overrides `settings.host`.
        port: overrides `settings.port`.
        tracking: the registry; None means the default store.
        app_name: name of the Serve application.

    Returns:
        The handle, with the URL.

    Raises:
        ModelLoadError: a reference does not exist or a model does not load in a replica.
        TrackingError: the registry cannot be opened.
        ConfigError: a canary of another form, or an address that others reach without an API key.
        ServingError: the port is taken, resources are missing, or nothing answered within `start_timeout_s`.
    """
    host, port = host or settings.host, port or settings.port
    keys = read_keys(settings, from_environment())
    check_exposure(host, keys)
    tracking = _for_replicas(tracking or TrackingSettings())
    tracks = _tracks([model_ref] if isinstance(model_ref, str) else model_ref, canaries)
    cards = [pin(track.reference, tracking) for track in tracks]
    owns_serve = start_serve(host, port)
    service = ServiceHandle(host, port, cards[0], app_name, owns_serve)
    engines = {engine_app_name(app_name, card): card for card in cards}
    try:
        applications = [(engine_application(settings, card, tracking), name, None) for name, card in engines.items()]
        front = front_application(settings, tracks, cards, tracking, keys, app_name)
        run_applications([*applications, (front, app_name, "/")])
        deadline = time.monotonic() + settings.start_timeout_s
        for name in (*engines, app_name):
            wait_until_running(name, settings, deadline)
        wait_until_it_answers(service.url, deadline)
    except BaseException:
        service.stop()
        raise
    return service


def engine_application(
    settings: ServeSettings, card: ModelCard, tracking: TrackingSettings, engine: type | None = None
) -> Any:
    """The engines of one version: an application without a route.

    Args:
        settings: replicas, autoscaling, health checks.
        card: the version.
        tracking: the registry.
        engine: class of a replica, built from (card, settings, tracking); None means `EngineReplica`.

    Returns:
        `ray.serve.Application`.
    """
    from ray import serve  # slow
    from ray.serve.config import RequestRouterConfig

    from pixellm.serve.replica import EngineReplica

    deployment = serve.deployment(
        engine or EngineReplica,
        name=ENGINE_DEPLOYMENT,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            # one is started even where none need stay: it proves that the version loads and answers
            "initial_replicas": max(1, settings.min_replicas),
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        request_router_config=RequestRouterConfig(
            request_router_class="pixellm.serve.affinity.PictureRouter",
            request_router_kwargs={"busy_at": settings.target_ongoing_requests},
            max_backoff_s=_LONGEST_WAIT_FOR_ROOM_S,
        ),
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=1,
        health_check_period_s=settings.health_check_period_s,
        health_check_timeout_s=settings.health_check_timeout_s,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_LOGGING,
    )
    return deployment.bind(card, settings, tracking)


def front_application(
    settings: ServeSettings,
    tracks: Sequence[Track],
    cards: Sequence[ModelCard | None],
    tracking: TrackingSettings,
    keys: Sequence[ApiKey],
    app_name: str,
) -> Any:
    """What stands in front of the engines: the ingress, and the fleet that follows the registry.

    Args:
        settings: limits.
        tracks: what is served; the first is the default.
        cards: the versions that the tracks mean now, where they are known.
        tracking: the registry.
        keys: who may ask.
        app_name: the application's name, prefix of the engines' names.

    Returns:
        `ray.serve.Application`.
    """
    from ray import serve  # slow

    from pixellm.serve.fleet import Fleet, first_roster
    from pixellm.serve.ingress import Ingress

    fleet = serve.deployment(
        Fleet,
        name=FLEET_DEPLOYMENT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,  # each ingress has one open at any time
        graceful_shutdown_timeout_s=1,
        logging_config=_LOGGING,
    )
    room = settings.max_ongoing_requests * settings.max_replicas + settings.max_queued_requests
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_DEPLOYMENT,
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": settings.ingress_cpus},
        # More than the engines take: the ingress itself must never be what queues, and health checks need room.
        max_ongoing_requests=2 * room + 64,
        health_check_period_s=settings.health_check_period_s,
        health_check_timeout_s=settings.health_check_timeout_s,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_LOGGING,
    )
    watcher = fleet.bind(tuple(tracks), tuple(cards), settings, tracking, app_name)
    return ingress.bind(watcher, first_roster(tracks, cards, app_name), settings, tuple(keys))


def application(arguments: dict[str, Any]) -> Any:
    """The service for `serve deploy` and a RayService: `import_path: pixellm.serve.app:application`.

    Args:
        arguments: `models` (a reference or a list), `canaries` (list of `REFERENCE=PERCENT%`), `config` (a recipe),
            `overrides` (list of `section.key=value`), `app_name` (that of the entry, `pixellm` when left out).

    Returns:
        `ray.serve.Application`; the fleet in it starts the engines.

    Raises:
        ConfigError: an unknown argument, or one that cannot be used.
    """
    unknown = set(arguments) - {"models", "canaries", "config", "overrides", "app_name"}
    if unknown or not arguments.get("models"):
        raise ConfigError(
            f"got the arguments {', '.join(map(repr, arguments)) or 'none'}; wanted models, and at most canaries, "
            "config, overrides, app_name"
        )
    settings = load_settings(arguments.get("config"), arguments.get("overrides") or ())
    models = arguments["models"]
    tracks = _tracks([models] if isinstance(models, str) else models, arguments.get("canaries") or ())
    keys = read_keys(settings.serve, from_environment())
    tracking = _for_replicas(settings.tracking)
    app_name = str(arguments.get("app_name", APP_NAME))
    return front_application(settings.serve, tracks, [None] * len(tracks), tracking, keys, app_name)


def _tracks(references: Sequence[str], canaries: Sequence[str]) -> list[Track]:
    return [*(Track(str(reference)) for reference in references), *(parse_canary(text) for text in canaries)]


def serve_forever(
    settings: Settings,
    model_refs: Sequence[str],
    *,
    canaries: Sequence[str] = (),
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Serves until Ctrl-C or SIGTERM, then stops cleanly. Starts a local Ray cluster where none is connected.

    Raises:
        As `deploy`; ClusterError when Ray cannot be reached.
    """
    check_exposure(host or settings.serve.host, read_keys(settings.serve, from_environment()))
    for track in _tracks(model_refs, canaries):
        pin(track.reference, settings.tracking)
    if (settings.cluster.address or from_environment().get("RAY_ADDRESS") or "local") == "local":
        check_port_is_free(host or settings.serve.host, port or settings.serve.port)
    os.environ.setdefault("RAY_worker_niceness", "0")  # a local cluster's workers start at nice 15: answers would wait
    cluster = connect(settings.cluster)
    try:
        service = deploy(
            settings.serve, model_refs, canaries=canaries, host=host, port=port, tracking=settings.tracking
        )
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
    return from_any_folder(tracking.model_copy(update={"uri": store_address(tracking, make_folder=False)}))
