"""Runs in a real MLflow store (SQLite): nothing lost, nothing hanging, nothing left open."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixellm.errors import ConfigError, TrackingError
from pixellm.platform.metric_writer import MetricWriter
from pixellm.platform.settings import Settings, TrackingSettings, load_settings
from pixellm.platform.tracking import RunReference, Tracker, connect_store, from_any_folder, start_run, store_address


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One store for the file: making one takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    return load_settings(None, [f"tracking.root={root}", "name=tracking-test", "train.steps=123"])


def run_of(settings: Settings, run_id: str) -> Any:
    return connect_store(store_address(settings.tracking)).get_run(run_id)


def history(settings: Settings, run_id: str, key: str) -> list[tuple[int, float]]:
    points = connect_store(store_address(settings.tracking)).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def python(code: str, *arguments: str, cwd: Path, wait: bool = True, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        process.args = (out, err)
    return process


# Where the store is


def test_the_default_store_is_sqlite_beside_the_artifacts_by_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_address(TrackingSettings()) == f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db"
    assert store_address(TrackingSettings(uri="sqlite:///x.db")) == f"sqlite:///{tmp_path}/x.db"
    assert store_address(TrackingSettings(uri="sqlite:////x.db")) == "sqlite:////x.db"
    assert store_address(TrackingSettings(uri="folder")) == f"file://{tmp_path}/folder"


def test_workers_find_the_callers_store_though_they_run_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        TrackingSettings(),
        TrackingSettings(uri="sqlite:///x.db"),
        TrackingSettings(root="s3://b/r", uri="http://h"),
    ]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    here = [store_address(tracking) for tracking in given]
    sent = [from_any_folder(tracking) for tracking in given]
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    assert [store_address(tracking) for tracking in sent] == here
    assert [tracking.root for tracking in sent] == [f"{tmp_path}/runs/mlflow"] * 2 + ["s3://b/r"]


def test_the_recipes_store_goes_before_the_environments_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from-environment:5000")
    assert store_address(TrackingSettings(uri="http://from-recipe")) == "http://from-recipe"
    assert store_address(TrackingSettings(root=str(tmp_path / "r"))) == "http://from-environment:5000"
    assert not (tmp_path / "r").exists()


def test_remote_artifacts_without_a_store_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        store_address(TrackingSettings(root="s3://bucket/runs"))


def test_a_store_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database " * 100)
    (tmp_path / "file").write_text("")
    for tracking in (TrackingSettings(root=str(tmp_path)), TrackingSettings(root=str(tmp_path / "file" / "x"))):
        with pytest.raises(TrackingError) as caught:
            start_run(Settings(tracking=tracking))
        assert "tracking.root" in str(caught.value)
        assert "\n" not in str(caught.value)


# What a run holds


def test_a_run_holds_the_resolved_settings_the_code_version_and_the_data_digests(settings: Settings) -> None:
    with start_run(settings, kind="evaluate", data_digests={"demo": "d1", "muse": "d2"}) as tracker:
        pass
    run = run_of(settings, tracker.run_id)
    assert run.info.run_name == "tracking-test"
    assert run.data.params == settings.flat()
    tags = run.data.tags
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["pixellm.version"] == __import__("pixellm").__version__
    assert (tags["pixellm.kind"], tags["pixellm.data.demo"], tags["pixellm.data.muse"]) == ("evaluate", "d1", "d2")
    stored = Path(run.info.artifact_uri.removeprefix("file://")) / "settings.yaml"
    assert load_settings(stored) == settings


def test_values_longer_than_mlflow_takes_are_cut_and_not_refused(settings: Settings) -> None:
    long = load_settings(None, [f"tracking.root={settings.tracking.root}", f"model.init_from={'x' * 9000}"])
    with start_run(long, data_digests={"d" * 300: "y" * 9000}) as tracker:
        tracker.set_tags({"note": "z" * 20_000})
    run = run_of(settings, tracker.run_id)
    assert run.data.params["model.init_from"] == "x" * 6000
    assert run.data.tags["note"] == "z" * 8000


def test_pictures_texts_files_and_folders_come_back_as_they_were(settings: Settings, tmp_path: Path) -> None:
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a.txt").write_text("a")
    (tmp_path / "single.json").write_text("{}")
    with start_run(settings) as tracker:
        tracker.log_image(picture, "pictures/step-1.png")
        tracker.log_text("words", "notes/words.txt")
        tracker.log_artifact(tmp_path / "folder", "kept")
        tracker.log_artifact(tmp_path / "single.json", "kept")
        with pytest.raises(TrackingError, match="absent"):
            tracker.log_artifact(tmp_path / "absent")
    artifacts = Path(run_of(settings, tracker.run_id).info.artifact_uri.removeprefix("file://"))
    np.testing.assert_array_equal(np.asarray(Image.open(artifacts / "pictures/step-1.png")), picture)
    assert (artifacts / "notes/words.txt").read_text() == "words"
    assert (artifacts / "kept/inner/a.txt").read_text() == "a"
    assert (artifacts / "kept/single.json").read_text() == "{}"


# Metrics


def test_every_metric_arrives_with_its_step_also_beyond_one_request(settings: Settings) -> None:
    with start_run(settings) as tracker:
        for step in range(1250):
            tracker.log_metrics({"loss.text": step / 8, "loss.dice": -step}, step)
        tracker.log_metrics({"odd": math.nan, "odder": math.inf}, 3)
        tracker.flush()
        assert history(settings, tracker.run_id, "loss.text") == [(step, step / 8) for step in range(1250)]
    assert history(settings, tracker.run_id, "loss.dice") == [(step, -step) for step in range(1250)]
    [(step, value)] = history(settings, tracker.run_id, "odd")
    assert step == 3
    assert math.isnan(value)


class SlowStore:
    """Accepts values only once it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.taken: list[float] = []

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        assert self.go.wait(30)
        self.taken += [metric.value for metric in metrics]


def test_a_store_that_stands_still_does_not_hold_up_the_step() -> None:
    store = SlowStore()
    writer = MetricWriter(store, "run")
    for step in range(100):  # returns although nothing can be written
        writer.put({"loss": float(step)}, step)
    with pytest.raises(TrackingError, match=r"100 metric values .* not written"):
        writer.flush(0.05)
    store.go.set()
    writer.flush(30)
    assert store.taken == [float(step) for step in range(100)]
    writer.close()
    with pytest.raises(TrackingError, match="closed"):
        writer.put({"loss": 1.0}, 1)


class FailingStore:
    """Fails a number of times, then works."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures
        self.taken: list[float] = []

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("store away\nsecond line")
        self.taken += [metric.value for metric in metrics]


def test_a_store_that_fails_three_times_and_then_works_loses_nothing() -> None:
    store = FailingStore(3)
    writer = MetricWriter(store, "run", attempts=4, retry_wait_s=0.001)
    writer.put({"a": 1.0, "b": 2.0}, 0)
    writer.close()
    assert store.taken == [1.0, 2.0]


def test_metrics_that_could_not_be_written_are_said_to_be_lost() -> None:
    store = FailingStore(2)
    writer = MetricWriter(store, "run", attempts=2, retry_wait_s=0.001)
    writer.put({"a": 1.0, "b": 2.0}, 0)
    with pytest.raises(TrackingError, match=r"2 metric values of run run could not be written \(store away\)"):
        writer.flush(30)
    writer.put({"a": 3.0}, 1)
    writer.close()
    assert store.taken == [3.0]


# How a run ends


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")],
)
def test_a_run_ends_as_its_job_does_and_keeps_what_was_buffered(
    error: BaseException | None, status: str, settings: Settings
) -> None:
    tracker = start_run(settings)
    with contextlib.suppress(BaseException) if error is not None else contextlib.nullcontext(), tracker:
        tracker.log_metrics({"loss": 0.5}, 9)
        if error is not None:
            raise error
    run = run_of(settings, tracker.run_id)
    assert run.info.status == status
    assert run.info.end_time >= run.info.start_time
    assert history(settings, tracker.run_id, "loss") == [(9, 0.5)]


_WORKER = """
import sys
from pixellm.platform.tracking import RunReference, Tracker
tracker = Tracker.attach(RunReference(sys.argv[1], sys.argv[2]))
for step in range(150):
    tracker.log_metrics({sys.argv[3]: step * 2.0}, step)
tracker.close()
"""


def test_two_processes_in_other_folders_log_to_one_store_at_once_and_none_is_lost(
    settings: Settings, tmp_path: Path
) -> None:
    with start_run(settings) as tracker:
        reference = tracker.reference
        workers = [
            python(_WORKER, reference.store, reference.run_id, key, cwd=tmp_path, wait=False) for key in ("r0", "r1")
        ]
        for worker in workers:
            _, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
        assert run_of(settings, tracker.run_id).info.status == "RUNNING"  # a worker does not end the driver's run
    for key in ("r0", "r1"):
        assert history(settings, tracker.run_id, key) == [(step, step * 2.0) for step in range(150)]
    assert list(tmp_path.iterdir()) == []  # no stray store where the workers ran


def test_a_resumed_job_continues_its_run_and_keeps_its_parameters(settings: Settings) -> None:
    first = start_run(settings)
    with contextlib.suppress(KeyboardInterrupt), first:
        first.log_metrics({"loss": 1.0}, 1)
        raise KeyboardInterrupt
    assert run_of(settings, first.run_id).info.status == "KILLED"
    changed = load_settings(None, [f"tracking.root={settings.tracking.root}", "train.steps=456"])
    second = start_run(changed, run_id=first.run_id)
    assert second.run_id == first.run_id
    assert run_of(settings, first.run_id).info.status == "RUNNING"
    with second:
        second.log_metrics({"loss": 2.0}, 2)
    run = run_of(settings, first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "123"
    assert history(settings, first.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    [resumed] = artifacts.glob("settings-resumed-*.yaml")
    assert load_settings(resumed) == changed


def test_a_run_that_the_store_no_longer_holds_is_begun_anew(settings: Settings) -> None:
    with start_run(settings, run_id="0" * 32) as tracker:
        assert tracker.run_id != "0" * 32


_KILLED_DRIVER = """
import sys, time
from pixellm.platform.settings import load_settings
from pixellm.platform.tracking import start_run
print(start_run(load_settings(None, ["tracking.root=" + sys.argv[1]])).run_id, flush=True)
time.sleep(600)
"""


def test_a_run_whose_driver_was_killed_is_closed_by_the_next_job_and_a_living_one_is_not(
    settings: Settings, tmp_path: Path
) -> None:
    mine = start_run(settings)
    driver = python(_KILLED_DRIVER, settings.tracking.root, cwd=tmp_path, wait=False)
    assert driver.stdout is not None
    orphan = driver.stdout.readline().strip()
    assert run_of(settings, orphan).info.status == "RUNNING"
    driver.send_signal(signal.SIGKILL)
    driver.wait(30)
    with start_run(settings):
        assert run_of(settings, orphan).info.status == "KILLED"
        assert run_of(settings, mine.run_id).info.status == "RUNNING"
    mine.finish()


def test_a_run_is_ended_even_when_its_last_metrics_cannot_be_written(settings: Settings) -> None:
    tracker = start_run(settings)
    tracker._writer = MetricWriter(FailingStore(99), tracker.run_id, attempts=1)
    tracker.log_metrics({"loss": 1.0}, 1)
    with pytest.raises(TrackingError, match="could not be written"):
        tracker.finish()
    assert run_of(settings, tracker.run_id).info.status == "FINISHED"


# Manners


def test_a_reference_is_all_that_travels_to_workers() -> None:
    import pickle

    reference = RunReference("sqlite:////x.db", "r")
    assert pickle.loads(pickle.dumps(reference)) == reference
    assert len(pickle.dumps(reference)) < 200


_QUIET = """
import sys
import pixellm.platform.tracking, pixellm.platform.registry
assert "mlflow" not in sys.modules
from pixellm.platform.settings import load_settings
with pixellm.platform.tracking.start_run(load_settings()) as tracker:
    tracker.log_metrics({"a": 1.0})
"""


def test_mlflow_is_imported_late_and_a_new_store_is_made_without_chatter(tmp_path: Path) -> None:
    done = python(_QUIET, cwd=tmp_path)
    assert done.args == ("", "")
    assert sorted(path.name for path in (tmp_path / "runs" / "mlflow").iterdir()) == ["artifacts", "mlflow.db"]


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(settings: Settings) -> None:
    other = load_settings(None, [f"tracking.root={settings.tracking.root}", "tracking.experiment=gone"])
    start_run(other).finish()
    client = connect_store(store_address(settings.tracking))
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match="restore"):
        start_run(other)


def test_attach_to_an_absent_server_fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:1"):
        Tracker.attach(RunReference("http://127.0.0.1:1", "r"))
    assert time.monotonic() - began < 60
