"""What is in service: shares of the traffic, names, and the watcher that follows a real registry."""

from collections import Counter
from pathlib import Path

import pytest

from pixellm.errors import BadRequestError, ConfigError, OverloadedError
from pixellm.platform.registry import set_alias
from pixellm.platform.settings import ServeSettings, TrackingSettings
from pixellm.platform.tracking import connect_store, store_address
from pixellm.serve.affinity import home_of
from pixellm.serve.fleet import Watcher
from pixellm.serve.model_card import ModelCard
from pixellm.serve.roster import AppState, Roster, Track, TrackState, engine_app_name, parse_canary, place_of

SETTINGS = ServeSettings(drain_s=10, start_timeout_s=100)
CHAMPION = "models:/m@champion"


def card(name: str, version: str) -> ModelCard:
    return ModelCard(name, version, f"models:/{name}/{version}", f"models:/{name}@champion", 0, {"version": version})


def test_a_canary_gets_its_share_and_a_key_stays_with_its_version() -> None:
    canary = TrackState(parse_canary("models:/m@candidate=10%"), card("m", "2"), "new")
    other = TrackState(Track("models:/other/5"), card("other", "5"), "other")
    roster = Roster(1, (TrackState(Track(CHAMPION), card("m", "1"), "old"), canary, other))
    chosen = {key: roster.choose(None, key).app_name for key in map(str, range(4000))}
    counts = Counter(chosen.values())
    assert set(counts) == {"old", "new"}
    assert 0.08 < counts["new"] / 4000 < 0.12
    assert all(roster.choose("m", key).app_name == app for key, app in list(chosen.items())[:200])
    assert roster.choose("other", "x").app_name == "other"
    assert roster.choose("m/2", "x").app_name == roster.choose("models:/m/2", "y").app_name == "new"
    assert [known.version for known in roster.cards()] == ["1", "2", "5"]
    with pytest.raises(BadRequestError, match="'m', 'other'") as refused:
        roster.choose("gpt-4o", "x")
    assert refused.value.status_code == 404
    with pytest.raises(OverloadedError):
        Roster(1, (TrackState(Track(CHAMPION)),)).choose(None, "x")
    assert 0 <= place_of("\udcff") < 1


@pytest.mark.parametrize("text", ["models:/m@candidate", "models:/m@candidate=10", "=10%", "m=0%", "m=100%", "m=-5%"])
def test_a_canary_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(ConfigError, match=r"=10%"):
        parse_canary(text)


def test_a_restarted_fleet_that_knows_nothing_yet_takes_nothing_out_of_service() -> None:
    serving = Roster(1, (TrackState(Track(CHAMPION), card("m", "1"), "old"),))
    fresh = Roster(2, (TrackState(Track(CHAMPION), loading="2"),))
    kept = fresh.keeping(serving).tracks[0]
    assert (kept.card, kept.app_name, kept.loading) == (card("m", "1"), "old", "2")


def test_a_replica_that_goes_moves_only_its_own_pictures() -> None:
    replicas = ["a", "b", "c", "d"]
    homes = {digest: replicas[home_of(digest, replicas)] for digest in map(str, range(2000))}
    assert all(400 < count < 600 for count in Counter(homes.values()).values())
    left = ["a", "b", "d"]
    assert all(left[home_of(digest, left)] == home for digest, home in homes.items() if home != "c")


class Engines:
    """Engines whose fate the test decides."""

    def __init__(self) -> None:
        self.states: dict[str, tuple[AppState, str]] = {}
        self.dropped: list[str] = []

    def deploy(self, app_name: str, _card: ModelCard) -> None:
        self.states[app_name] = (AppState.STARTING, "")

    def state(self, app_name: str) -> tuple[AppState, str]:
        return self.states.get(app_name, (AppState.ABSENT, ""))

    def drop(self, app_name: str) -> None:
        self.dropped.append(app_name)
        del self.states[app_name]

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.states if name.startswith(prefix)]

    def become(self, app_name: str, state: AppState, why: str = "") -> None:
        assert app_name in self.states, self.states
        self.states[app_name] = (state, why)


@pytest.fixture
def tracking(tmp_path: Path) -> TrackingSettings:
    """A real registry with three versions of `m`; version 1 is champion."""
    tracking = TrackingSettings(root=str(tmp_path / "registry"))
    client = connect_store(store_address(tracking))
    client.create_registered_model("m")
    pyfunc = "flavors: {python_function: {artifacts: {model: {path: model}}}}\n"
    for version in (1, 2, 3):
        source = tmp_path / f"version-{version}"
        (source / "model").mkdir(parents=True)
        (source / "model" / "config.json").write_text("{}")
        (source / "model" / "model.safetensors").touch()
        (source / "MLmodel").write_text(pyfunc)
        client.create_model_version("m", str(source))
    set_alias("m", "champion", 1, tracking)
    return tracking


def test_a_new_champion_is_loaded_beside_the_old_and_a_bad_one_never_serves(tracking: TrackingSettings) -> None:
    engines = Engines()
    watcher = Watcher([Track(CHAMPION)], [None], engines, SETTINGS, tracking, "app")
    apps = [""] + [engine_app_name("app", card("m", str(version))) for version in (1, 2, 3)]

    def serving() -> str | None:
        known = watcher.roster.tracks[0].card
        return None if known is None else known.version

    watcher.round(0)
    assert (serving(), watcher.roster.tracks[0].loading, watcher.is_loading) == (None, "1", True)
    engines.become(apps[1], AppState.RUNNING)
    watcher.round(1)
    assert (serving(), watcher.roster.tracks[0].loading) == ("1", None)
    generation = watcher.roster.generation
    watcher.round(2)
    assert watcher.roster.generation == generation  # nothing moved, nobody is told

    set_alias("m", "champion", 2, tracking)
    watcher.round(3)
    assert (serving(), watcher.roster.tracks[0].loading) == ("1", "2")  # the old one answers meanwhile
    engines.become(apps[2], AppState.FAILED, "does not answer its golden example")
    watcher.round(4)
    state = watcher.roster.tracks[0]
    assert (serving(), state.loading, engines.dropped) == ("1", None, [apps[2]])
    assert state.failed == (("2", "does not answer its golden example"),)
    assert state.to_json_dict()["failed"] == [{"version": "2", "reason": "does not answer its golden example"}]
    watcher.round(5)
    assert apps[2] not in engines.states  # not tried again

    set_alias("m", "champion", 3, tracking)
    watcher.round(6)
    watcher.round(90)
    assert serving() == "1"
    watcher.round(107)
    assert serving() == "1"  # never came up within start_timeout_s
    assert "start_timeout_s" in watcher.roster.tracks[0].failed[-1][1]

    set_alias("m", "champion", 1, tracking)
    watcher.round(110)
    assert (serving(), apps[1] in engines.states) == ("1", True)
    fresh = Watcher([Track(CHAMPION)], [None], engines, SETTINGS, tracking, "app")
    fresh.round(0)
    assert fresh.roster.tracks[0].app_name == apps[1]  # a restarted watcher adopts what runs
    set_alias("m", "champion", 3, tracking)
    fresh.round(1)
    engines.become(apps[3], AppState.RUNNING)
    fresh.round(2)
    assert fresh.roster.tracks[0].app_name == apps[3]
    fresh.round(8)
    assert apps[1] in engines.states  # answers that it began are finished
    fresh.round(13)
    assert set(engines.states) == {apps[3]}
    known = fresh.roster.tracks[0].card
    connect_store(store_address(tracking)).delete_registered_model_alias("m", "champion")
    fresh.round(20)
    assert fresh.roster.tracks[0].card == known  # an alias that is gone takes nothing out of service
    assert fresh.roster.tracks[0].problem
