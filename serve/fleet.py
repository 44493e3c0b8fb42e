"""Follows the registry and brings versions into service: each version's engines are a Serve application of their own.

A new champion is loaded beside the old one and asked its golden example (the engine replica does so as it starts); only
when it runs does the roster name it, and the old one's engines go once nobody asks them any more. One that does not
come up is dropped, said in the roster, and not tried again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from pixellm.errors import PixelLMError
from pixellm.platform import registry
from pixellm.platform.settings import ServeSettings, TrackingSettings
from pixellm.serve.controller import deployment_error, run_applications
from pixellm.serve.model_card import ModelCard, pin
from pixellm.serve.roster import AppState, Roster, Step, Track, TrackState, advance, engine_app_name

_LOG = logging.getLogger(__name__)

_LONG_POLL_S = 10.0
_TICK_S = 0.1
_BUSY_PERIOD_S = 0.25


class Engines(Protocol):
    """Where engines run: Ray Serve, or a test's stand-in."""

    def deploy(self, app_name: str, card: ModelCard) -> None:
        """Starts the engines of a version; returns at once."""
        ...

    def state(self, app_name: str) -> tuple[AppState, str]:
        """What became of them, and why where they failed."""
        ...

    def drop(self, app_name: str) -> None:
        """Takes them down, open questions first; returns at once."""
        ...

    def names(self, prefix: str) -> list[str]:
        """The applications whose name begins so."""
        ...


class Watcher:
    """The state of all tracks, moved on by `round`.

    Args:
        tracks: what to follow; the first is the default model.
        cards: versions that are known already, by track (None: not yet looked up).
        engines: where engines run.
        settings: periods and limits.
        tracking: the registry.
        app_name: prefix of the engines' applications.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        cards: Sequence[ModelCard | None],
        engines: Engines,
        settings: ServeSettings,
        tracking: TrackingSettings,
        app_name: str,
    ) -> None:
        self._engines = engines
        self._settings = settings
        self._tracking = tracking
        self._app_name = app_name
        self._wanted: list[ModelCard | None] = list(cards)
        self._deployed_s: dict[str, float] = {}
        self._retired_s: dict[str, float] = {}
        self.roster = Roster(time.time_ns(), tuple(TrackState(track) for track in tracks))

    @property
    def is_loading(self) -> bool:
        """Whether something is on its way, so that the next round should come soon."""
        return any(state.loading is not None for state in self.roster.tracks)

    def round(self, now_s: float) -> None:
        """Asks the registry, moves each track on by one step, and takes down what nobody needs."""
        states = tuple(self._moved(number, state, now_s) for number, state in enumerate(self.roster.tracks))
        if states != self.roster.tracks:
            self.roster = Roster(time.time_ns(), states)
        self._take_down(now_s)

    def _moved(self, number: int, state: TrackState, now_s: float) -> TrackState:
        try:
            wanted = self._look_up(number, state.track)
        except PixelLMError as error:
            _LOG.warning("%s: %s", state.track.reference, error)
            return replace(state, problem=str(error), loading=None)
        app_name = engine_app_name(self._app_name, wanted)
        app, why = self._engines.state(app_name)
        waited_s = now_s - self._deployed_s.get(app_name, now_s)
        after, step = advance(state, wanted, app_name, app, waited_s, self._settings.start_timeout_s, why)
        if step is Step.DEPLOY:
            self._deployed_s[app_name] = now_s
            self._engines.deploy(app_name, wanted)
        elif step is Step.DROP:
            _LOG.error("%s version %s is not taken into service: %s", wanted.id, wanted.version, after.failed[-1][1])
            if app_name in self._deployed_s:  # otherwise whoever deployed it looks after it
                self._engines.drop(app_name)
        return replace(after, problem=None)

    def _look_up(self, number: int, track: Track) -> ModelCard:
        """The version that a track's reference means now; files are looked for only when it is another one."""
        known = self._wanted[number]
        if known is None:
            known = pin(track.reference, self._tracking)
        elif "@" in track.reference and track.reference.startswith("models:"):
            found = registry.look_up(track.reference, self._tracking)
            if found.reference != known.reference:
                known = pin(track.reference, self._tracking)
        self._wanted[number] = known
        return known

    def _take_down(self, now_s: float) -> None:
        """Drops engines that have not been used for `drain_s`; none while a track has nothing in service."""
        if any(state.card is None for state in self.roster.tracks):
            return
        used = {state.app_name for state in self.roster.tracks}
        used |= {engine_app_name(self._app_name, card) for card in self._wanted if card is not None}
        idle = [name for name in self._engines.names(f"{self._app_name}.") if name not in used]
        self._retired_s = {name: self._retired_s.get(name, now_s) for name in idle}
        for app_name, since_s in list(self._retired_s.items()):
            if now_s - since_s >= self._settings.drain_s:
                del self._retired_s[app_name]
                self._engines.drop(app_name)


class Fleet:
    """The deployment that holds the watcher: one replica, no CPU to speak of.

    Args:
        tracks, cards, settings, tracking, app_name: as `Watcher`.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        cards: Sequence[ModelCard | None],
        settings: ServeSettings,
        tracking: TrackingSettings,
        app_name: str,
    ) -> None:
        engines = ServeEngines(settings, tracking)
        self._watcher = Watcher(tracks, cards, engines, settings, tracking, app_name)
        self._period_s = settings.watch_period_s
        self._thread = threading.Thread(target=self._watch, name="registry-watcher", daemon=True)
        self._thread.start()

    async def roster(self, known_generation: int) -> Roster:
        """The roster once it is another than the one known, or after some seconds as it is."""
        deadline = time.monotonic() + _LONG_POLL_S
        while self._watcher.roster.generation == known_generation and time.monotonic() < deadline:
            await asyncio.sleep(_TICK_S)
        return self._watcher.roster

    def check_health(self) -> None:
        """What Serve asks; raises when the watcher's thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the registry watcher has ended")

    def _watch(self) -> None:
        while True:
            try:
                self._watcher.round(time.monotonic())
            except Exception:  # a thread's boundary: the next round tries again
                _LOG.exception("a round of the registry watcher failed")
            time.sleep(min(self._period_s, _BUSY_PERIOD_S) if self._watcher.is_loading else self._period_s)


class ServeEngines:
    """Engines as applications of Ray Serve."""

    def __init__(self, settings: ServeSettings, tracking: TrackingSettings) -> None:
        self._settings = settings
        self._tracking = tracking

    def deploy(self, app_name: str, card: ModelCard) -> None:
        """As `Engines.deploy`."""
        from pixellm.serve.app import engine_application  # app imports this module

        run_applications([(engine_application(self._settings, card, self._tracking), app_name, None)])

    def state(self, app_name: str) -> tuple[AppState, str]:
        """As `Engines.state`."""
        from ray import serve

        application = serve.status().applications.get(app_name)
        status = "NOT_STARTED" if application is None else str(application.status.value)
        if status == "RUNNING":
            return AppState.RUNNING, ""
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            return AppState.FAILED, str(deployment_error(application))
        return (AppState.ABSENT if status in ("NOT_STARTED", "DELETING") else AppState.STARTING), ""

    def drop(self, app_name: str) -> None:
        """As `Engines.drop`."""
        from ray import serve

        serve.delete(app_name, _blocking=False)

    def names(self, prefix: str) -> list[str]:
        """As `Engines.names`."""
        from ray import serve

        found = serve.status().applications.items()
        return [name for name, app in found if name.startswith(prefix) and str(app.status.value) != "DELETING"]


def first_roster(tracks: Sequence[Track], cards: Sequence[ModelCard | None], app_name: str) -> Roster:
    """What an ingress starts from, until the fleet tells it more."""
    states: list[Any] = [
        TrackState(track) if card is None else TrackState(track, card, engine_app_name(app_name, card))
        for track, card in zip(tracks, cards, strict=True)
    ]
    return Roster(0, tuple(states))
