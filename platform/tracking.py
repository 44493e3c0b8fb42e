"""The record of a run in MLflow: one run per job, written by one process at a time.

The driver opens the run (`start_run`), workers receive its `RunReference` (store address and run id, a few bytes that
pickle) and rank 0 alone attaches to it (`Tracker.attach`): MLflow's active run is thread-local and does not follow into
Ray tasks, so nothing here uses it. Metrics are buffered and written by a background thread, so that a slow store never
holds up a training step; `flush` and `finish` wait for it and say what could not be written.

Without a server the store is a SQLite file beside the artifacts, under `tracking.root` (`store_address`).
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pixellm.errors import ConfigError, TrackingError
from pixellm.platform import storage
from pixellm.platform.metric_writer import MetricWriter
from pixellm.platform.settings import Settings, TrackingSettings, from_environment
from pixellm.platform.version import code_version

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own limits (mlflow.utils.validation): entities per request, and characters.
_PARAMS_PER_REQUEST = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250
_SQLITE_HEAD = b"SQLite format 3\0"

_HOST_TAG, _PID_TAG = "pixellm.host", "pixellm.process"


@dataclass(frozen=True)
class RunReference:
    """What a worker needs to write to a run: absolute store address and run id."""

    store: str
    run_id: str


def store_address(tracking: TrackingSettings, *, make_folder: bool = True) -> str:
    """Where MLflow's store is, as an absolute address (workers have another working directory).

    `tracking.uri` wins, then `MLFLOW_TRACKING_URI`, then a SQLite file `mlflow.db` under `tracking.root`.

    Args:
        tracking: the settings.
        make_folder: makes the folder of the SQLite file.

    Raises:
        ConfigError: `tracking.root` is a URI and no store address is given (SQLite needs a folder).
    """
    uri = tracking.uri or from_environment().get("MLFLOW_TRACKING_URI")
    if uri is None:
        if "://" in tracking.root:
            raise ConfigError(
                f"tracking.root is {tracking.root!r} and no store is given; set tracking.uri (or MLFLOW_TRACKING_URI) "
                "to an MLflow server or database, or tracking.root to a local folder"
            )
        root = Path(tracking.root).absolute()
        if make_folder:
            _make_folder(root)
        return f"sqlite:///{root / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if "://" not in uri and not uri.startswith(("file:", "databricks")):
        return Path(uri).absolute().as_uri()
    return uri


def from_any_folder(tracking: TrackingSettings) -> TrackingSettings:
    """The same store and registry for processes with another working directory: paths become absolute."""
    uri = None if tracking.uri is None else store_address(tracking, make_folder=False)
    return tracking.model_copy(update={"root": storage.absolute(tracking.root), "uri": uri})


def connect_store(address: str) -> Any:
    """An `MlflowClient` on a store address, with MLflow's own chatter silenced.

    Raises:
        TrackingError: the store cannot be opened.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    _check_database_file(address)
    with tracking_errors(f"cannot open the MLflow store {address}"):
        from mlflow import MlflowClient  # slow (1 s), so not at import

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        client.search_experiments(max_results=1)  # MLflow connects on first use: fail here, with a clear message
        return client


@contextmanager
def tracking_errors(what: str) -> Iterator[None]:
    """Turns whatever MLflow and its database raise into one `TrackingError` line that begins with `what`."""
    import sqlalchemy.exc  # slow, and only MLflow needs it
    from mlflow.exceptions import MlflowException  # slow

    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrackingError(
            f"{what}: {first_line[:300]}; check tracking.uri, MLFLOW_TRACKING_URI and tracking.root"
        ) from error


def start_run(
    settings: Settings,
    *,
    run_id: str | None = None,
    kind: str = "train",
    data_digests: Mapping[str, str] | None = None,
) -> "Tracker":
    """Opens the run of a job on the driver: a new one, or the one that a resumed job continues.

    A new run gets the resolved settings as parameters and as the artifact `settings.yaml`, code version and data
    digests as tags. A continued run is set back to RUNNING and keeps its parameters; the settings it goes on with are
    added as another artifact. Runs that a killed process of this machine left RUNNING are closed as KILLED.

    Args:
        settings: the resolved tree; `settings.name` becomes the run's name.
        run_id: the run to continue; None, or an id that the store does not hold (any more), starts a new one.
        kind: what the job does: "train", "evaluate", …; kept as the tag `pixellm.kind`.
        data_digests: source name or URI → digest of its shards.

    Raises:
        TrackingError: the store cannot be opened or written.
    """
    address = store_address(settings.tracking)
    client = connect_store(address)
    with tracking_errors(f"cannot open a run in the MLflow store {address}"):
        experiment_id = _experiment_id(client, settings.tracking)
        _close_orphans(client, experiment_id)
        tags = _run_tags(settings, kind, data_digests or {})
        if run_id is not None and _is_known_run(client, run_id):
            client.update_run(run_id, status="RUNNING")
            for key in (_HOST_TAG, _PID_TAG):
                client.set_tag(run_id, key, tags[key])
            artifact = f"settings-resumed-{time.strftime('%Y%m%dT%H%M%S')}.yaml"
        else:
            run_id = client.create_run(experiment_id, run_name=settings.name, tags=tags).info.run_id
            _log_params(client, run_id, settings.flat())
            artifact = "settings.yaml"
        client.log_text(run_id, settings.to_yaml(), artifact)
    return Tracker(RunReference(address, run_id), client)


class Tracker:
    """Writes to one run. As a context manager it never leaves the run open: FINISHED, FAILED, or KILLED on Ctrl-C."""

    def __init__(self, reference: RunReference, client: Any) -> None:
        """Use `start_run` (driver) or `Tracker.attach` (worker)."""
        self.reference = reference
        self._client = client
        self._writer = MetricWriter(client, reference.run_id)

    @classmethod
    def attach(cls, reference: RunReference) -> "Tracker":
        """Opens an existing run from another process, to log to it; it does not end the run.

        Raises:
            TrackingError: the store cannot be opened.
        """
        return cls(reference, connect_store(reference.store))

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.reference.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Hands numbers to the background writer and returns at once.

        Args:
            metrics: name → value; values that are not finite are kept (MLflow stores NaN and infinities).
            step: optimiser step the values belong to.
        """
        self._writer.put(metrics, step)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Waits until every metric handed over so far is in the store.

        Raises:
            TrackingError: a metric could not be written, or not within `timeout_s` seconds.
        """
        self._writer.flush(timeout_s)

    def log_image(self, image: Any, path: str) -> None:
        """Stores a picture as an artifact.

        Args:
            image: PIL image, or uint8 array [H, W, 3] (0–255) or [H, W].
            path: artifact path with its suffix, e.g. "pictures/step-000100.png".

        Raises:
            TrackingError: the artifact store refused.
        """
        with tracking_errors(f"cannot store the picture {path}"):
            self._client.log_image(self.run_id, image, artifact_file=path)

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Stores a file, or a folder with everything in it, under `artifact_path` of the run's artifacts.

        Raises:
            TrackingError: the path does not exist or the artifact store refused.
        """
        local = Path(local_path)
        with tracking_errors(f"cannot store {local} with the run"):
            if local.is_dir():
                self._client.log_artifacts(self.run_id, str(local), artifact_path or local.name)
            else:
                self._client.log_artifact(self.run_id, str(local), artifact_path)

    def log_text(self, text: str, path: str) -> None:
        """Stores text as the artifact `path`.

        Raises:
            TrackingError: the artifact store refused.
        """
        with tracking_errors(f"cannot store {path} with the run"):
            self._client.log_text(self.run_id, text, path)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags on the run (values are cut at MLflow's 8,000 characters).

        Raises:
            TrackingError: the store refused.
        """
        with tracking_errors(f"cannot tag the run {self.run_id}"):
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key[:_KEY_LENGTH], str(value)[:_TAG_LENGTH])

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Writes what is buffered and ends the run with `status`, even when a metric could not be written.

        Raises:
            TrackingError: a metric or the status could not be written.
        """
        try:
            self._writer.close()
        finally:
            with tracking_errors(f"cannot end the run {self.run_id}"):
                self._client.set_terminated(self.run_id, status)

    def close(self) -> None:
        """Writes what is buffered and lets go of the run without ending it (a worker's last call).

        Raises:
            TrackingError: a metric could not be written.
        """
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
            return
        try:
            self.finish("KILLED" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "FAILED")
        except TrackingError:
            # The job's own error is the one to report; the store's is logged beside it.
            logging.getLogger(__name__).exception("the run %s could not be ended", self.run_id)


def _check_database_file(address: str) -> None:
    """Says at once what MLflow finds out after trying for a quarter of a minute."""
    if not address.startswith("sqlite:///"):
        return
    path = Path(address.removeprefix("sqlite:///"))
    try:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE_HEAD))
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrackingError(
            f"cannot read the MLflow store {path} ({error.strerror}); set tracking.root to another folder"
        ) from None
    if head and head != _SQLITE_HEAD:
        raise TrackingError(
            f"the MLflow store {path} is no SQLite database; move it away, or set tracking.root to another folder"
        )


def _experiment_id(client: Any, tracking: TrackingSettings) -> str:
    from mlflow.exceptions import MlflowException  # slow

    found = client.get_experiment_by_name(tracking.experiment)
    if found is None:
        try:
            return client.create_experiment(tracking.experiment, artifact_location=_artifact_location(client, tracking))
        except MlflowException:  # another process made it between the two calls
            found = client.get_experiment_by_name(tracking.experiment)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {tracking.experiment!r} is deleted; restore it (mlflow experiments restore "
            f"--experiment-id {found.experiment_id}) or choose another tracking.experiment"
        )
    return found.experiment_id


def _artifact_location(client: Any, tracking: TrackingSettings) -> str | None:
    if client.tracking_uri.startswith(("http://", "https://", "databricks")):
        return None  # the server decides
    if "://" in tracking.root:
        return tracking.root.rstrip("/")
    folder = Path(tracking.root).absolute() / "artifacts"
    _make_folder(folder)
    return folder.as_uri()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(
            f"cannot make the folder {folder} for MLflow ({error.strerror}); set tracking.root to a writable folder"
        ) from None


def _is_known_run(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException  # slow

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def _run_tags(settings: Settings, kind: str, data_digests: Mapping[str, str]) -> dict[str, str]:
    code = code_version()
    tags = {
        "pixellm.kind": kind,
        "pixellm.version": code.version,
        "pixellm.preset": settings.model.preset,
        _HOST_TAG: socket.gethostname(),
        _PID_TAG: _process_mark(os.getpid()),
    }
    if code.commit is not None:
        tags["mlflow.source.git.commit"] = code.commit
        tags["pixellm.is_modified"] = str(code.is_modified).lower()
    if code.wheel_digest is not None:
        tags["pixellm.wheel_digest"] = code.wheel_digest
    for name, digest in data_digests.items():
        tags[f"pixellm.data.{name}"[:_KEY_LENGTH]] = digest
    return {key: value[:_TAG_LENGTH] for key, value in tags.items()}


def _log_params(client: Any, run_id: str, flat: Mapping[str, str]) -> None:
    from mlflow.entities import Param  # slow

    params = [Param(key[:_KEY_LENGTH], value[:_PARAM_LENGTH]) for key, value in flat.items()]
    for start in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_REQUEST])


def _close_orphans(client: Any, experiment_id: str) -> None:
    """Ends runs that a process of this machine left RUNNING when it was killed without a chance to say so."""
    running = client.search_runs(
        [experiment_id],
        filter_string=f"attributes.status = 'RUNNING' and tags.`{_HOST_TAG}` = '{socket.gethostname()}'",
        max_results=1000,
    )
    for run in running:
        mark = run.data.tags.get(_PID_TAG, "")
        pid = mark.partition(":")[0]
        if pid.isdigit() and _process_mark(int(pid)) != mark:
            client.set_terminated(run.info.run_id, "KILLED")


def _process_mark(pid: int) -> str:
    """`pid:start`, which no later process with the same pid shares; "" when there is no such process.

    The start is the kernel's tick count from `/proc`; where there is no `/proc` it is empty.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it runs, as somebody else
    try:
        # The command name, in parentheses, may hold spaces; field 22 counted from the start is 20 after it.
        start = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        start = ""
    return f"{pid}:{start}"
