"""Which versions are in service, under which names, with which share of the traffic. Pure: everything here pickles.

A *track* is what the operator asked for: an alias that may move, a fixed version, or a folder. A canary is a track with
a share below 1 beside the track of the same model that takes the rest.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from pixellm.errors import BadRequestError, ConfigError, OverloadedError
from pixellm.serve.model_card import ModelCard

_CANARY = re.compile(r"(?P<reference>.+)=(?P<percent>\d+(?:\.\d+)?)%")
_MAX_FAILURES = 5


@dataclass(frozen=True, slots=True)
class Track:
    """What is followed: a reference, and its share of its model's traffic (1 but for canaries)."""

    reference: str
    share: float = 1.0

    @property
    def public_name(self) -> str:
        """The reference as others may see it: of a folder its last name only."""
        return self.reference if self.reference.startswith("models:") else PurePath(self.reference).name

    @property
    def is_canary(self) -> bool:
        """Whether another track of the same model takes the rest."""
        return self.share < 1


@dataclass(frozen=True, slots=True)
class TrackState:
    """A track and what became of it.

    Attributes:
        track: what is followed.
        card: the version that takes its traffic; None until one does.
        app_name: Serve application of that version's engines.
        loading: the version that is being loaded beside it, if any.
        failed: (version, why) of versions that were not taken into service, oldest first.
        problem: why the registry could not be asked last time, if so.
    """

    track: Track
    card: ModelCard | None = None
    app_name: str = ""
    loading: str | None = None
    failed: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for `/readyz`."""
        return {
            "reference": self.track.public_name,
            "share": self.track.share,
            "model": None if self.card is None else self.card.id,
            "serving": None if self.card is None else self.card.version,
            "loading": self.loading,
            "failed": [{"version": version, "reason": reason} for version, reason in self.failed],
            "registry": self.problem or "ok",
        }


@dataclass(frozen=True, slots=True)
class Roster:
    """All tracks; the first is the default model. `generation` differs between any two states."""

    generation: int
    tracks: tuple[TrackState, ...]

    def keeping(self, before: "Roster") -> "Roster":
        """This roster, but a track that has lost its version keeps the one it had (the fleet restarted)."""
        served = {state.track: state for state in before.tracks if state.card is not None}
        tracks = tuple(
            replace(state, card=served[state.track].card, app_name=served[state.track].app_name)
            if state.card is None and state.track in served
            else state
            for state in self.tracks
        )
        return Roster(self.generation, tracks)

    def cards(self) -> list[ModelCard]:
        """The versions in service, each once, the default first."""
        return list({state.card.reference: state.card for state in self.tracks if state.card is not None}.values())

    def find(self, name: str | None) -> list[TrackState]:
        """The tracks that a request's `model` field may mean.

        Args:
            name: a model's id (all its tracks), `ID/VERSION`, or a reference; None means the default model.

        Raises:
            BadRequestError: 404, nothing of that name is served.
            OverloadedError: it is on its way, but no version of it is in service yet.
        """
        serving = [(state, state.card) for state in self.tracks if state.card is not None]
        if not serving:
            raise OverloadedError("no model is in service yet", retry_after_s=2)
        wanted = serving[0][1].id if name is None else name
        found = [state for state, card in serving if card.id == wanted]
        found = found or [state for state, card in serving if card.answers_to(wanted)]
        if not found:
            known = ", ".join(repr(card.id) for card in {card.id: card for _, card in serving}.values())
            raise BadRequestError(
                f"the model {wanted[:100]!r} is not served here; this server has {known} (GET /v1/models)",
                status_code=404,
                param="model",
                code="model_not_found",
            )
        return found

    def choose(self, name: str | None, sticky: str) -> TrackState:
        """The track that answers a request: canaries get their share, the same `sticky` text always the same track.

        Raises:
            As `find`.
        """
        found = self.find(name)
        place = place_of(sticky)
        for state in found:
            if state.track.is_canary:
                if place < state.track.share:
                    return state
                place -= state.track.share
        return next((state for state in found if not state.track.is_canary), found[0])


class AppState(StrEnum):
    """What Ray Serve says of one version's engines."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"


class Step(StrEnum):
    """What is to be done for a track now."""

    NOTHING = "nothing"
    DEPLOY = "deploy"
    DROP = "drop"


def advance(
    state: TrackState, wanted: ModelCard, app_name: str, app: AppState, waited_s: float, limit_s: float, why: str = ""
) -> tuple[TrackState, Step]:
    """One step of a track towards the version that its reference means now.

    Args:
        state: the track.
        wanted: the version that its reference means.
        app_name: where the wanted version's engines are, or are to be.
        app: what Serve says of them.
        waited_s: seconds since they were deployed.
        limit_s: how long they may take.
        why: what Serve says about a failure.

    Returns:
        (state afterwards, what to do). Until the wanted version runs, the state's `card` stays what it was; a version
        that failed is not tried again.
    """
    if state.card is not None and state.card.reference == wanted.reference:
        return replace(state, card=wanted, loading=None), Step.NOTHING
    if any(version == wanted.version for version, _ in state.failed):
        return replace(state, loading=None), Step.NOTHING
    if app is AppState.RUNNING:
        return replace(state, card=wanted, app_name=app_name, loading=None), Step.NOTHING
    if app is AppState.ABSENT:
        return replace(state, loading=wanted.version), Step.DEPLOY
    if app is AppState.FAILED or waited_s > limit_s:
        reason = why or f"it was not up after {limit_s:g} s (serve.start_timeout_s)"
        failed = (*state.failed, (wanted.version, reason))[-_MAX_FAILURES:]
        return replace(state, loading=None, failed=failed), Step.DROP
    return replace(state, loading=wanted.version), Step.NOTHING


def parse_canary(text: str) -> Track:
    """`models:/NAME@candidate=10%` as a track.

    Raises:
        ConfigError: it is of another form, or the share is not between 0 and 100 %.
    """
    match = _CANARY.fullmatch(text)
    share = float(match["percent"]) / 100 if match else 0.0
    if match is None or not 0 < share < 1:
        raise ConfigError(f"got the canary {text!r}; wanted REFERENCE=PERCENT%, e.g. models:/pixellm@candidate=10%")
    return Track(match["reference"], share)


def place_of(text: str) -> float:
    """A fixed place in [0, 1) for a text, uniform over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64


def engine_app_name(app_name: str, card: ModelCard) -> str:
    """The Serve application that holds a version's engines: the same text for the same version."""
    words = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{card.id}.{card.version}")
    digest = hashlib.blake2b(card.reference.encode(), digest_size=3).hexdigest()
    return f"{app_name}.{words}.{digest}"
