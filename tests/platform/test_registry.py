"""The registry on a real MLflow store: versions, aliases, the gate, references."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixellm.errors import ConfigError, ModelLoadError, TrackingError
from pixellm.platform import registry
from pixellm.platform.gate import Gate, decide, decide_all, parse_no_regression, parse_requirement
from pixellm.platform.registry import ModelVersion
from pixellm.platform.settings import Settings, TrackingSettings
from pixellm.platform.tracking import Tracker, start_run

# A pyfunc that answers with what is in its model folder, so that a test sees which folder was loaded.
_ECHO = """
from pathlib import Path
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

class Echo(PythonModel):
    def load_context(self, context):
        self.weights = (Path(context.artifacts["model"]) / "weights").read_text()

    def predict(self, model_input: list[str]):
        return [f"{self.weights}: {prompt}" for prompt in model_input]

set_model(Echo())
"""

Register = Callable[..., ModelVersion]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(root=str(tmp_path_factory.mktemp("registry")))


@pytest.fixture(scope="module")
def run(tracking: TrackingSettings) -> Tracker:
    return start_run(Settings(tracking=tracking))


@pytest.fixture
def register(run: Tracker, tmp_path: Path) -> Register:
    """Registers a model folder with the given metric under a name that is the test's own."""
    name = f"model-{uuid.uuid4().hex[:8]}"
    code = tmp_path / "echo.py"
    code.write_text(_ECHO)

    def make(giou: float | None = 0.5, weights: str = "w", **more: float) -> ModelVersion:
        folder = tmp_path / f"model-{weights}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text(weights)
        metrics = more | ({} if giou is None else {"giou": giou})
        return registry.register_model(folder, run, metrics, python_model=code, name=name)

    return make


# The gate, pure


def test_the_gate_says_exactly_why_not() -> None:
    gate = Gate("giou", floor=0.4, max_regression=0.02)
    assert decide(gate, {"giou": 0.39}, None).reason == "giou 0.39 is below the floor 0.4"
    assert decide(gate, {"giou": 0.5}, {"giou": 0.53}).reason == "giou 0.5 is more than 0.02 below the champion's 0.53"
    assert decide(gate, {"ciou": 0.5}, None).reason == "the version has no 'giou'; it has ciou"
    assert decide(gate, {"giou": 0.5}, {}).reason == "the champion has no 'giou' to compare with; it has no metrics"
    assert not decide(gate, {"giou": math.nan}, None).passed


def test_requirements_and_no_regressions_are_read_as_they_are_written() -> None:
    assert parse_requirement("muse.giou>=0.40") == Gate("muse.giou", 0.4, None)
    assert parse_requirement("refcoco+.ciou >= .5") == Gate("refcoco-plus.ciou", 0.5, None)
    assert parse_no_regression("mrefcoco.ciou:0.5") == Gate("mrefcoco.ciou", None, 0.005)
    assert parse_no_regression("giou") == Gate("giou", None, 0.0)
    for text in ("muse.giou", "muse.giou>0.4", "muse.giou>=much", ">=0.4", "giou>=nan"):
        with pytest.raises(ConfigError, match="METRIC>=VALUE"):
            parse_requirement(text)
    for text in ("giou:", "giou:-1", "giou:some", ":0.5", "a b:1"):
        with pytest.raises(ConfigError, match="METRIC:POINTS"):
            parse_no_regression(text)


def test_of_several_gates_all_must_pass_and_each_that_does_not_is_named() -> None:
    gates = [parse_requirement("muse.giou>=0.40"), parse_no_regression("mrefcoco.ciou:0.5")]
    champion = {"mrefcoco.ciou": 0.6}
    passed = decide_all(gates, {"muse.giou": 0.4, "mrefcoco.ciou": 0.596}, champion)
    assert passed.passed
    assert passed.reason == "muse.giou 0.4 reaches the floor 0.4; mrefcoco.ciou 0.596 against the champion's 0.6"
    assert decide_all(gates, {"muse.giou": 0.4, "mrefcoco.ciou": 0.1}, None).passed
    one = decide_all(gates, {"muse.giou": 0.5, "mrefcoco.ciou": 0.594}, champion)
    assert (one.passed, one.reason) == (False, "mrefcoco.ciou 0.594 is more than 0.005 below the champion's 0.6")
    both = decide_all(gates, {"muse.giou": 0.3}, champion)
    assert not both.passed
    assert both.reason.startswith("muse.giou 0.3 is below the floor 0.4; the version has no 'mrefcoco.ciou'")
    assert "pixellm evaluate --suite mrefcoco" in both.reason


finite = st.floats(0, 1)


@given(finite, finite, finite, finite)
def test_the_gate_passes_exactly_what_reaches_the_floor_and_does_not_regress_too_far(
    value: float, champion: float, floor: float, slack: float
) -> None:
    gate = Gate("m", floor, slack)
    assert decide(gate, {"m": value}, None).passed == (value >= floor)
    assert decide(gate, {"m": value}, {"m": champion}).passed == (value >= floor and value >= champion - slack)


# Versions


def test_a_registered_version_is_a_candidate_with_its_metrics_and_its_run(
    register: Register, run: Tracker, tracking: TrackingSettings
) -> None:
    first, second = register(0.25, ciou=0.125), register(0.75)
    assert (first.version, second.version) == (1, 2)
    assert first.metrics == {"giou": 0.25, "ciou": 0.125}
    assert first.run_id == run.run_id
    listed = registry.list_versions(first.name, tracking)
    assert [(version.version, version.aliases) for version in listed] == [(2, ("candidate",)), (1, ())]
    assert registry.look_up(f"models:/{first.name}@candidate", tracking) == listed[0]
    assert second.to_json_dict()["reference"] == f"models:/{first.name}/2"


def test_a_version_loads_as_a_pyfunc_and_answers_from_its_own_folder(
    register: Register, tracking: TrackingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    name = register(weights="one").name
    register(weights="two")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracking.root}/mlflow.db")
    for reference, answer in ((f"models:/{name}/1", "one: hello"), (f"models:/{name}@candidate", "two: hello")):
        assert mlflow.pyfunc.load_model(reference).predict(["hello"]) == [answer]


def test_a_folder_that_is_no_model_is_not_registered(run: Tracker, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        registry.register_model(tmp_path, run, {}, python_model=tmp_path / "x.py")


# Promotion


def test_champion_moves_through_the_gate_and_back_again(register: Register, tracking: TrackingSettings) -> None:
    gate = Gate("giou", floor=0.3, max_regression=0.02)
    name = register(0.2).name

    def aliases() -> dict[int, tuple[str, ...]]:
        return {version.version: version.aliases for version in registry.list_versions(name, tracking)}

    refused = registry.promote(f"models:/{name}@candidate", gate, tracking)
    assert (refused.passed, refused.champion_now) == (False, None)
    assert aliases() == {1: ("candidate",)}

    register(0.5)
    first = registry.promote(f"models:/{name}@candidate", gate, tracking)
    assert (first.passed, first.champion_before, first.champion_now) == (True, None, 2)
    assert aliases() == {1: (), 2: ("candidate", "champion")}

    register(0.47)
    worse = registry.promote(f"models:/{name}/3", gate, tracking)
    assert (worse.passed, worse.champion_now) == (False, 2)
    assert aliases()[2] == ("champion",)

    register(0.6)
    better = registry.promote(f"models:/{name}@candidate", gate, tracking)
    assert (better.champion_before, better.champion_now) == (2, 4)
    assert better.candidate.aliases == ("candidate", "champion")
    assert aliases() == {1: (), 2: ("previous",), 3: (), 4: ("candidate", "champion")}

    registry.add_metrics(registry.look_up(f"models:/{name}/3", tracking), {"muse.giou": 0.41}, tracking)
    missed = registry.promote(f"models:/{name}/3", [parse_requirement("muse.giou>=0.42")], tracking)
    assert (missed.passed, missed.reason) == (False, "muse.giou 0.41 is below the floor 0.42")

    again = registry.promote(f"models:/{name}/4", gate, tracking)
    assert again.passed
    assert aliases()[2] == ("previous",)  # promoting the champion changes nothing

    assert registry.rollback(name, tracking).version == 2
    assert aliases() == {1: (), 2: ("champion",), 3: (), 4: ("candidate",)}
    with pytest.raises(TrackingError, match="previous"):
        registry.rollback(name, tracking)


def test_promotions_at_the_same_time_end_as_if_one_came_after_the_other(
    register: Register, tracking: TrackingSettings
) -> None:
    name = register(0.5).name
    register(0.6)
    gate = Gate("giou", max_regression=0.0)
    start = threading.Barrier(2)
    done: dict[int, registry.Promotion] = {}

    def promote(version: int) -> None:
        start.wait()
        done[version] = registry.promote(f"models:/{name}/{version}", gate, tracking)

    threads = [threading.Thread(target=promote, args=(version,)) for version in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert registry.look_up(f"models:/{name}@champion", tracking).version == 2
    assert done[2].passed
    assert done[1].passed == (done[2].champion_before == 1)


# References


def test_every_form_of_reference_resolves_to_the_folder_with_those_weights(
    register: Register, tracking: TrackingSettings, tmp_path: Path
) -> None:
    name = register(weights="one").name
    register(weights="two")
    registry.set_alias(name, "blessed", 1, tracking)
    forms = {
        f"models:/{name}/1": "one",
        f"models:/{name}/2": "two",
        f"models:/{name}@candidate": "two",
        f"models:/{name}@blessed": "one",
        str(tmp_path / "model-two"): "two",
    }
    for reference, weights in forms.items():
        folder = registry.resolve(reference, tracking)
        assert folder.is_absolute()
        assert (folder / "weights").read_text() == weights
        assert (folder / "config.json").is_file()


def test_a_version_does_not_change_when_its_training_folder_does(
    register: Register, tracking: TrackingSettings, tmp_path: Path
) -> None:
    name = register(weights="one").name
    (tmp_path / "model-one" / "weights").write_text("trained on")
    register(weights="one")  # the same run and folder again
    assert (registry.resolve(f"models:/{name}/1", tracking) / "weights").read_text() == "one"


@pytest.mark.parametrize(
    ("reference", "kind", "said"),
    [
        ("models:/{name}@champion", ModelLoadError, "versions 1 and the aliases candidate (version 1)"),
        ("models:/{name}/7", ModelLoadError, "versions 1 and the aliases candidate (version 1)"),
        ("models:/nobody/1", TrackingError, "registered: "),
        ("models:/{name}", ModelLoadError, "models:/NAME@alias or models:/NAME/VERSION"),
        ("models:/{name}/one", ModelLoadError, "models:/NAME@alias or models:/NAME/VERSION"),
        ("no/such/folder", ModelLoadError, "does not exist"),
        ("/", ModelLoadError, "has no config.json"),
    ],
)
def test_a_reference_that_means_nothing_is_one_line_that_lists_what_exists(
    reference: str, kind: type[Exception], said: str, register: Register, tracking: TrackingSettings
) -> None:
    name = register().name
    with pytest.raises(kind) as caught:
        registry.resolve(reference.format(name=name), tracking)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_version_whose_files_are_gone_says_so(register: Register, tracking: TrackingSettings) -> None:
    version = register()
    shutil.rmtree(version.source.removeprefix("file://"))
    with pytest.raises(ModelLoadError, match="register it again"):
        registry.resolve(version.reference, tracking)


def test_listing_an_unknown_model_names_those_that_exist(register: Register, tracking: TrackingSettings) -> None:
    name = register().name
    with pytest.raises(TrackingError, match=name):
        registry.list_versions("unknown", tracking)
    with pytest.raises(TrackingError, match=name):
        registry.rollback("unknown", tracking)
    with pytest.raises(TrackingError, match="version 9"):
        registry.set_alias(name, "champion", 9, tracking)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server that keeps artifacts where only it can reach them."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "kept")]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen([*command, *places], stdout=log, stderr=log, start_new_session=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while not answers(url):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_with_a_server_the_same_code_records_registers_and_downloads_once(
    server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingSettings(uri=server, root=str(tmp_path / "root"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "echo.py").write_text(_ECHO)
    with start_run(Settings(tracking=tracking)) as run:
        run.log_metrics({"loss": 0.5}, 1)
        registry.register_model(folder, run, {"giou": 0.5}, python_model=tmp_path / "echo.py")
    assert registry.promote("models:/pixellm@candidate", Gate(floor=0.5), tracking).passed
    local = registry.resolve("models:/pixellm@champion", tracking)
    assert local.is_relative_to(tmp_path / "root" / "downloads")
    assert (local / "weights").read_bytes() == (folder / "weights").read_bytes()
    before = (local / "weights").stat()
    assert registry.resolve("models:/pixellm/1", tracking) == local
    assert (local / "weights").stat() == before
    assert capfd.readouterr().out == ""
