"""What an ingress knows of the roster, and the way to each version's engines."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from pixellm.serve.backend import Backend
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.roster import Roster

_LOG = logging.getLogger(__name__)

_FIRST_WORD_S = 10.0
_PAUSE_S = 0.5


class Models(Protocol):
    """What the routes ask for models."""

    @property
    def roster(self) -> Roster:
        """The versions in service."""
        ...

    def backend(self, app_name: str) -> Backend:
        """The way to the engines of an application that the roster names."""
        ...


class LiveModels:
    """Follows the fleet by long polling.

    Args:
        fleet: handle of the fleet deployment.
        roster: what to start from.
        connect: makes the way to the engines of an application.
        metrics: told each roster.
    """

    def __init__(self, fleet: Any, roster: Roster, connect: Callable[[str], Backend], metrics: ServiceMetrics) -> None:
        self._fleet = fleet
        self._connect = connect
        self._metrics = metrics
        self._backends: dict[str, Backend] = {}
        self._task: asyncio.Task[None] | None = None
        self._roster = roster
        self._take(roster)

    @property
    def roster(self) -> Roster:
        """As `Models.roster`."""
        return self._roster

    def backend(self, app_name: str) -> Backend:
        """As `Models.backend`."""
        if app_name not in self._backends:
            self._backends[app_name] = self._connect(app_name)
        return self._backends[app_name]

    async def start(self) -> None:
        """Begins to follow; waits a moment for the fleet's first word, since a restarted ingress knows old news."""
        with suppress(Exception):  # the fleet is not up yet: `_follow` goes on asking
            async with asyncio.timeout(_FIRST_WORD_S):
                self._take(await self._fleet.roster.remote(-1))
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Ends following."""
        if self._task is not None:
            self._task.cancel()

    async def _follow(self) -> None:
        while True:
            try:
                roster = await self._fleet.roster.remote(self._roster.generation)
            except Exception as error:  # the fleet restarts: what is known stays in force
                _LOG.warning("the fleet does not answer: %s", str(error).split("\n", 1)[0])
                await asyncio.sleep(_PAUSE_S)
                continue
            if roster.generation != self._roster.generation:
                self._take(roster)

    def _take(self, roster: Roster) -> None:
        roster = roster.keeping(self._roster)
        self._roster = roster
        self._metrics.show_roster(roster)
        used = {state.app_name for state in roster.tracks}
        self._backends = {name: backend for name, backend in self._backends.items() if name in used}
