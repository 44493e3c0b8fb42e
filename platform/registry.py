"""The model registry: a finished model folder becomes a version, and aliases say which version is which.

Aliases: `candidate` is the version registered last, `champion` the one that is served, `previous` the champion before
it. A version moves to `champion` through a `Gate` (`pixellm.platform.gate`), which says exactly why not otherwise.
References, accepted wherever a model is asked for: a model folder, `models:/NAME@alias`, `models:/NAME/VERSION`.
"""

import fcntl
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

import pixellm
from pixellm.errors import ModelLoadError, TrackingError
from pixellm.platform.gate import Gate, GateDecision, decide_all
from pixellm.platform.settings import TrackingSettings
from pixellm.platform.tracking import RunReference, Tracker, connect_store, store_address, tracking_errors

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_METRIC_TAG = "metric."
_ARTIFACT = "model"
_DEFAULT = TrackingSettings()


@dataclass(frozen=True)
class ModelVersion:
    """One registered version. `metrics` are those given when it was registered; `source` is where its files are."""

    name: str
    version: int
    aliases: tuple[str, ...]
    metrics: dict[str, float]
    run_id: str | None
    created_ms: int
    source: str

    @property
    def reference(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"aliases": list(self.aliases), "reference": self.reference}


@dataclass(frozen=True)
class Promotion:
    """What the gate said about a version, and which version is champion now."""

    passed: bool
    reason: str
    candidate: ModelVersion
    champion_before: int | None
    champion_now: int | None


def register_model(
    model_dir: str | Path,
    run: Tracker | RunReference,
    metrics: Mapping[str, float],
    *,
    python_model: Path,
    name: str = "pixellm",
    signature: Any = None,
    input_example: Any = None,
    tags: Mapping[str, str] | None = None,
) -> ModelVersion:
    """Registers a model folder as a new version with the alias `candidate`.

    The version is an MLflow pyfunc in models-from-code form: `python_model` is executed where the version is loaded and
    finds the folder as its artifact "model". The files are written below the run's artifacts before the version is
    made, so that a version never points at half a model.

    Args:
        model_dir: what `from_pretrained` reads.
        run: the run that the model comes from.
        metrics: name → value, kept as tags of the version; gates read them.
        python_model: the module file that calls `mlflow.models.set_model`.
        name: registered model name; made when it does not exist.
        signature: `mlflow.models.ModelSignature` of the pyfunc.
        input_example: an input that the signature accepts.
        tags: further tags of the version.

    Raises:
        ModelLoadError: `model_dir` is not a model folder.
        TrackingError: the store refused.
    """
    folder = Path(model_dir)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"cannot register {folder}: it has no config.json; give a folder that save_pretrained wrote"
        )
    reference = run.reference if isinstance(run, Tracker) else run
    client = connect_store(reference.store)
    with tracking_errors(f"cannot register {folder} as {name!r}"):
        source = _store_pyfunc(client, reference.run_id, folder, python_model, signature, input_example)
        _ensure_registered_model(client, name)
        version_tags = {f"{_METRIC_TAG}{key}": repr(float(value)) for key, value in metrics.items()} | dict(tags or {})
        made = client.create_model_version(name, source, run_id=reference.run_id, tags=version_tags)
        client.set_registered_model_alias(name, CANDIDATE, made.version)
        return _get_version(client, name, int(made.version))


def list_versions(name: str, tracking: TrackingSettings = _DEFAULT) -> list[ModelVersion]:
    """All versions of a registered model, newest first.

    Raises:
        TrackingError: there is no such model; the message lists those that exist.
    """
    client = _client(tracking)
    _check_name(client, name)
    with tracking_errors(f"cannot list the versions of {name!r}"):
        found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
        # The search leaves aliases out, the registered model has them.
        aliases = _aliases(client, name)
        versions = [_to_version(version, aliases) for version in found]
    return sorted(versions, key=lambda version: -version.version)


def look_up(reference: str, tracking: TrackingSettings = _DEFAULT) -> ModelVersion:
    """The version that `models:/NAME@alias` or `models:/NAME/VERSION` means now.

    Raises:
        ModelLoadError: the text is not such a reference, or the registry has no such alias or version; the message
            lists what exists.
        TrackingError: there is no such model, or the store cannot be opened.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelLoadError(f"{reference!r} is not models:/NAME@alias or models:/NAME/VERSION")
    client = _client(tracking)
    name = match["name"]
    _check_name(client, name)
    with tracking_errors(f"cannot look up {reference}"):
        aliases = _aliases(client, name)
        numbers = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
        wanted = aliases.get(match["alias"]) if match["alias"] else int(match["version"])
        if wanted not in numbers:
            raise ModelLoadError(
                f"{reference} does not exist; {name} has the versions {_listed(numbers)} and the aliases "
                f"{_listed(f'{alias} (version {number})' for alias, number in sorted(aliases.items()))}"
            )
        return _get_version(client, name, wanted)


def resolve(reference: str | Path, tracking: TrackingSettings = _DEFAULT) -> Path:
    """A local model folder for a reference; files in a remote artifact store are downloaded once.

    Args:
        reference: a model folder, `models:/NAME@alias` or `models:/NAME/VERSION`.
        tracking: which registry; downloads are kept under `tracking.root`.

    Returns:
        The folder that `PixelLMEngine.from_pretrained` reads.

    Raises:
        ModelLoadError: no such folder, version or alias, or the version's files are gone.
        TrackingError: no such registered model, or the store cannot be opened.
    """
    text = str(reference)
    if not text.startswith("models:"):
        folder = Path(text).expanduser()
        if (folder / "config.json").is_file():
            return folder.absolute()
        problem = "has no config.json" if folder.is_dir() else "does not exist"
        raise ModelLoadError(
            f"the model folder {folder} {problem}; give a folder that save_pretrained wrote, models:/NAME@alias or "
            "models:/NAME/VERSION"
        )
    found = look_up(text, tracking)
    pyfunc_folder = _local_folder(found, tracking)
    try:
        described = yaml.safe_load((pyfunc_folder / "MLmodel").read_text(encoding="utf-8"))
        folder = pyfunc_folder / described["flavors"]["python_function"]["artifacts"][_ARTIFACT]["path"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise ModelLoadError(
            f"{text} is registered, but {found.source} holds no pixellm model; register it again"
        ) from None
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{text} is registered, but its files are gone from {folder}; register it again")
    return folder


def set_alias(name: str, alias: str, version: int, tracking: TrackingSettings = _DEFAULT) -> None:
    """Points an alias at a version.

    Raises:
        TrackingError: no such model or version.
    """
    client = _client(tracking)
    with tracking_errors(f"cannot set {name}@{alias} to version {version}"):
        client.set_registered_model_alias(name, alias, str(version))


def add_metrics(version: ModelVersion, metrics: Mapping[str, float], tracking: TrackingSettings = _DEFAULT) -> None:
    """Adds metrics to a registered version, in the place of those of the same names; gates read them.

    Raises:
        TrackingError: the version is gone, or the store cannot be written.
    """
    client = _client(tracking)
    with tracking_errors(f"cannot add metrics to {version.reference}"):
        for name, value in metrics.items():
            client.set_model_version_tag(version.name, str(version.version), f"{_METRIC_TAG}{name}", repr(float(value)))


def promote(reference: str, gate: Gate | Sequence[Gate], tracking: TrackingSettings = _DEFAULT) -> Promotion:
    """Moves `champion` to a version if it passes every gate; the former champion becomes `previous`.

    Promotions on one machine are serialised, so that two at once compare with the same champion in turn.

    Raises:
        ModelLoadError, TrackingError: as `look_up`.
    """
    with _registry_lock(tracking):
        candidate = look_up(reference, tracking)
        client = _client(tracking)
        champion = _version_with_alias(client, candidate.name, CHAMPION)
        if champion is not None and champion.version == candidate.version:
            decision = GateDecision(True, f"version {candidate.version} is the champion already")
        else:
            gates = [gate] if isinstance(gate, Gate) else gate
            decision = decide_all(gates, candidate.metrics, None if champion is None else champion.metrics)
        before = None if champion is None else champion.version
        if not decision.passed or before == candidate.version:
            return Promotion(decision.passed, decision.reason, candidate, before, before)
        with tracking_errors(f"cannot make {candidate.reference} the champion"):
            # `previous` first: stopped in between, the registry still names a champion.
            if before is not None:
                client.set_registered_model_alias(candidate.name, PREVIOUS, str(before))
            client.set_registered_model_alias(candidate.name, CHAMPION, str(candidate.version))
            now = _get_version(client, candidate.name, candidate.version)
        return Promotion(True, decision.reason, now, before, candidate.version)


def rollback(name: str, tracking: TrackingSettings = _DEFAULT) -> ModelVersion:
    """Gives `champion` back to `previous`, and removes `previous`: there is nothing further to go back to.

    Returns:
        The version that is champion now.

    Raises:
        TrackingError: no such model, or it has no `previous`.
    """
    with _registry_lock(tracking):
        client = _client(tracking)
        _check_name(client, name)
        previous = _version_with_alias(client, name, PREVIOUS)
        if previous is None:
            raise TrackingError(
                f"{name} has no version with the alias {PREVIOUS!r} to go back to; choose one of "
                "`pixellm models list` and promote it"
            )
        with tracking_errors(f"cannot roll {name} back to version {previous.version}"):
            client.set_registered_model_alias(name, CHAMPION, str(previous.version))
            client.delete_registered_model_alias(name, PREVIOUS)
            return _get_version(client, name, previous.version)


def _store_pyfunc(
    client: Any, run_id: str, folder: Path, python_model: Path, signature: Any, input_example: Any
) -> str:
    """Writes the pyfunc below the run's artifacts, under a name of its own; returns its URI."""
    import mlflow.pyfunc  # slow

    artifact_uri = client.get_run(run_id).info.artifact_uri.rstrip("/")
    local_root = _local_path(artifact_uri)
    if local_root is not None:
        local_root.mkdir(parents=True, exist_ok=True)
    artifact = f"{_ARTIFACT}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix=".pyfunc-", dir=local_root) as scratch:
        written = Path(scratch) / artifact
        mlflow.pyfunc.save_model(
            str(written),
            python_model=str(python_model),
            artifacts={_ARTIFACT: str(folder.absolute())},
            signature=signature,
            input_example=input_example,
            pip_requirements=[f"pixellm=={pixellm.__version__}"],
        )
        if local_root is None:
            client.log_artifacts(run_id, str(written), artifact)
        else:  # same disk: one copy of the weights, renamed into place when complete
            written.rename(local_root / artifact)
    return f"{artifact_uri}/{artifact}"


def _local_folder(version: ModelVersion, tracking: TrackingSettings) -> Path:
    """The version's pyfunc folder on this machine, downloaded under `tracking.root` when it is elsewhere."""
    local = _local_path(version.source)
    if local is not None:
        return local
    import mlflow.artifacts  # slow

    root = Path(tracking.root).absolute() if "://" not in tracking.root else Path(tempfile.gettempdir())
    store = store_address(tracking)
    digest = hashlib.sha256(f"{store} {version.source}".encode()).hexdigest()[:8]
    final = root / "downloads" / f"{version.name}-{version.version}-{digest}"
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with (
        tracking_errors(f"cannot download {version.reference} from {version.source}"),
        tempfile.TemporaryDirectory(prefix=".download-", dir=final.parent) as scratch,
    ):
        written = mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=scratch, tracking_uri=store)
        try:
            Path(written).rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was quicker with the same files
                raise
    return final


def _local_path(uri: str) -> Path | None:
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(uri) if parsed.scheme == "" else None


def _client(tracking: TrackingSettings) -> Any:
    return connect_store(store_address(tracking))


def _check_name(client: Any, name: str) -> None:
    with tracking_errors("cannot list the registered models"):
        known = sorted(model.name for model in client.search_registered_models(max_results=1000))
    if name not in known:
        raise TrackingError(
            f"no model named {name!r} is registered in {client.tracking_uri}; registered: {_listed(known)}; "
            "training registers one, and tracking.root or MLFLOW_TRACKING_URI says which store is read"
        )


def _ensure_registered_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException  # slow

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _aliases(client: Any, name: str) -> dict[str, int]:
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _version_with_alias(client: Any, name: str, alias: str) -> ModelVersion | None:
    with tracking_errors(f"cannot read {name}@{alias}"):
        number = _aliases(client, name).get(alias)
        return None if number is None else _get_version(client, name, number)


def _get_version(client: Any, name: str, number: int) -> ModelVersion:
    return _to_version(client.get_model_version(name, str(number)), _aliases(client, name))


def _to_version(found: Any, aliases: Mapping[str, int]) -> ModelVersion:
    number = int(found.version)
    return ModelVersion(
        name=found.name,
        version=number,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if target == number)),
        metrics={
            key.removeprefix(_METRIC_TAG): float(value)
            for key, value in found.tags.items()
            if key.startswith(_METRIC_TAG)
        },
        run_id=found.run_id or None,
        created_ms=int(found.creation_timestamp),
        source=found.source,
    )


def _listed(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items) or "none"


@contextmanager
def _registry_lock(tracking: TrackingSettings) -> Iterator[None]:
    """Holds the machine-wide lock on changes of the aliases of one store."""
    digest = hashlib.sha256(store_address(tracking).encode()).hexdigest()[:16]
    with (Path(tempfile.gettempdir()) / f"pixellm-registry-{os.getuid()}-{digest}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
